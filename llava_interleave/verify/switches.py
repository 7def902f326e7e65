"""Why do my numbers differ? The ways in which pipelines for these checkpoints differ, each switched alone, and what it does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import weights
from ..chatbot import locate
from ..model import Llava
from ..processing import Processor
from .parity import agreeing, conversations, forward, greedy

BASELINE = "preset hf, pictures squashed, float32, all layers of the tower"
CASES = ("one image", "three images")
PROMPTS: dict[str, dict[str, Any]] = {
    "preset interleave": {"preset": "interleave"},
    "preset official": {"preset": "official"},
    "geometry pad": {"pad": True},
    "geometry anyres": {"anyres": True},
}
"""What is switched in the making of a prompt."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What one switch does to the answer to one prompt, against `BASELINE`.

    prompt: its length in tokens. kl: Kullback-Leibler divergence of the first answer token's distribution from the baseline's, in
    nats. likeliest: whether the likeliest first token is the same. same: how many of the `tokens` greedy tokens agree before the
    first that differs. text: the greedy tokens.
    """

    switch: str
    case: str
    prompt: int
    kl: float
    likeliest: bool
    same: int
    tokens: int
    text: str


Answered = tuple[int, Tensor, list[int]]
"""Length of the prompt, log-probabilities of the first answer token in float64, greedy tokens."""


def why(
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    tokens: int = 32,
    say: Callable[[int, int], None] | None = None,
) -> list[Effect]:
    """The effects of every switch on one picture and on several; the first rows are the baseline itself. Needs no transformers.

    say: told how many of the answers are there, and of how many.
    """
    folder = locate(name, revision)
    processor = Processor.from_folder(folder)
    baseline: dict[str, Answered] = {}
    effects: list[Effect] = []
    for switch, case, answered in _answers(folder, processor, tokens):
        base = baseline.setdefault(case, answered)
        effects.append(_effect(switch, case, base, answered, processor))
        if say:
            say(len(effects), len(CASES) * (len(PROMPTS) + 4))
    return effects


def _answers(folder: Path, processor: Processor, tokens: int) -> Iterator[tuple[str, str, Answered]]:
    chats = {case: chat for case, chat in conversations().items() if case in CASES}

    def answers(model: Llava, switch: str, **given: Any) -> Iterator[tuple[str, str, Answered]]:
        for case, chat in chats.items():
            prompt = processor.prompt(chat, **{"preset": "hf", **given})
            first = forward(model, prompt)[-1, : processor.tokenizer.size].double().log_softmax(dim=-1)
            yield switch, case, (len(prompt), first, greedy(model, processor, prompt, tokens))

    model = weights.load(folder, dtype=torch.float32)
    yield from answers(model, "baseline")
    for switch, given in PROMPTS.items():
        yield from answers(model, switch, **given)
    model.vision_tower.encoder.layers = model.vision_tower.encoder.layers[:-1]
    yield from answers(model, "layer before the last")
    for dtype in (torch.bfloat16, torch.float16):
        del model
        gc.collect()
        model = weights.load(folder, dtype=dtype)
        yield from answers(model, str(dtype).removeprefix("torch."))


def _effect(switch: str, case: str, base: Answered, answered: Answered, processor: Processor) -> Effect:
    (_, before, theirs), (length, first, written) = base, answered
    kl = float((before.exp() * (before - first)).sum())
    same = bool(before.argmax() == first.argmax())
    text = processor.tokenizer.decode(written)
    return Effect(switch, case, length, max(0.0, kl), same, agreeing(theirs, written), len(written), text)
