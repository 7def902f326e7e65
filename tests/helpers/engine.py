"""Shared by tests: see tests/test_engine.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig
from llava_interleave.engine import Engine, Event, Request, SamplingParams
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.model import Llava, PackedAttention, arrange_features
from llava_interleave.prompt import Media, Prompt

IMAGE, VOCAB, EOS = 60, 58, 57


GRID = 3


TOKEN = 2 * 2 * 2 * 8 * 4  # bytes of KV cache per token


CONFIG = LlavaConfig(
    VisionConfig(16, 32, 1, 2, image_size=12, patch_size=4),
    TextConfig(32, 48, 2, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=64, context=1000),
    image_token_id=IMAGE,
)


@cache
def network() -> Llava:
    torch.manual_seed(0)
    model = Llava(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():  # wide enough that answers differ
        if parameter.ndim > 1:
            parameter.normal_(0, 0.25)
    return model


def engine(tokens: int = 4000, **options: Any) -> Engine:
    return Engine(network(), eos_ids={EOS}, vocab=VOCAB, kv_bytes=tokens * TOKEN, **options)


@cache
def pixels(number: int, crops: int = 1) -> Tensor:
    return torch.randn(crops, 3, 12, 12, generator=torch.Generator().manual_seed(number))


def media(number: int, start: int, crops: int = 1, layout: ImageTokenLayout | None = None) -> Media:
    layout = layout or ImageTokenLayout(GRID, crops)
    return Media(pixels(number, layout.crops), layout, repr((number, layout)).encode(), start)


def text(number: int, length: int) -> list[int]:
    return torch.randint(
        0, VOCAB - 1, (length,), generator=torch.Generator().manual_seed(1000 + number)
    ).tolist()


def prompt(*parts: list[int] | tuple[int, int] | tuple[int, ImageTokenLayout]) -> Prompt:
    """Lists are text; (number, crops) is an image or video, (number, layout) an anyres image."""
    tokens, found = [], []
    for part in parts:
        if isinstance(part, list):
            tokens += part
        else:
            layout = (
                part[1]
                if isinstance(part[1], ImageTokenLayout)
                else ImageTokenLayout(GRID, part[1])
            )
            found.append(media(part[0], len(tokens), layout=layout))
            tokens += [IMAGE] * layout.length
    return Prompt(tokens, tuple(found))


TILED = ImageTokenLayout(GRID, 5, (2, 2), (1, 0, 4, 6))


MIXED = [
    prompt(text(0, 7), (0, 1), text(1, 3), (1, 1), text(2, 4)),
    prompt(text(3, 40)),
    prompt((2, 4), text(4, 5)),
    prompt(text(5, 30), (3, TILED), text(6, 2)),
    prompt((0, 1), text(7, 1)),
    prompt(text(8, 3), (4, 1)),  # ends in an image
]


GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)


@torch.inference_mode()
def naive(p: Prompt, new: int, *, stops: frozenset[int] = frozenset()) -> list[int]:
    """A whole forward for each token."""
    model, tokens = network(), list(p.tokens)
    features = [(m.start, arrange_features(model.encode(m.pixels), m.layout)) for m in p.media]
    for _ in range(new):
        x = model.embed(torch.tensor(tokens), features)
        logits = model.logits(
            model.forward(x, torch.arange(len(tokens)), PackedAttention([len(tokens)]))
        )[-1, :VOCAB]
        tokens.append(int(logits.argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(p.tokens) :]


@cache
def expected() -> list[list[int]]:
    answers = [naive(p, 12) for p in MIXED]
    assert len({tuple(answer) for answer in answers}) == len(MIXED)
    return answers


def answers(requests: Sequence[Request]) -> list[list[int]]:
    return [request.generated for request in requests]


def finish(e: Engine) -> list[Event]:
    events = []
    while e.busy:
        events += e.step()
        e.check()
    return events


def stream(e: Engine, p: Prompt, how: SamplingParams, **options: Any) -> list[Event]:
    """All events of one request."""
    request = e.add(p, how, **options)
    return [event for event in finish(e) if event.request is request]


class Counting(Llava):
    """Counts the crops and the calls of the tower and the rows of the decoder."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.load_state_dict(network().state_dict())
        self.eval().requires_grad_(False)
        self.calls: list[int] = []
        self.rows = 0
        self.heads = 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.calls.append(len(pixels))
        return super().encode(pixels)

    def forward(self, x: Tensor, positions: Tensor, attend: Any) -> Tensor:
        self.rows += len(x)
        return super().forward(x, positions, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        self.heads += len(hidden)
        return super().logits(hidden)


def counted(tokens: int = 4000, **options: Any) -> tuple[Engine, Counting]:
    model = Counting()
    return Engine(model, eos_ids={EOS}, vocab=VOCAB, kv_bytes=tokens * TOKEN, **options), model


class Failing(Counting):
    """Runs out of memory, or is interrupted, after a chosen forward: half of the step is done."""

    error: BaseException | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().logits(hidden)


def failing(tokens: int = 4000, **options: Any) -> tuple[Engine, Failing]:
    model = Failing()
    return Engine(model, eos_ids={EOS}, vocab=VOCAB, kv_bytes=tokens * TOKEN, **options), model


SAMPLED = [
    SamplingParams(max_new_tokens=12, temperature=1.0, seed=1, ignore_eos=True),
    SamplingParams(
        max_new_tokens=12, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=2, ignore_eos=True
    ),
    SamplingParams(
        max_new_tokens=12, repetition_penalty=1.5, frequency_penalty=0.5, ignore_eos=True
    ),
    SamplingParams(
        max_new_tokens=12,
        temperature=1.2,
        presence_penalty=1.0,
        logit_bias={4: 2.0},
        seed=3,
        logprobs=2,
        ignore_eos=True,
    ),
    GREEDY,
    SamplingParams(max_new_tokens=12, temperature=2.0, seed=4, ignore_eos=True),
]


PARTS: list[Any] = [text(0, 33), text(1, 9), (0, 1), (1, 1), (2, 3), (3, TILED), text(2, 20)]
