"""Answers of the model in training to a few held-out questions, logged at every evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from .. import data_url
from ..engine import Engine, SamplingParams, bytes_per_token
from ..model import Llava
from ..processing import Processor
from ..processing.chat_template import MediaPlaceholder, parse
from ..processing.video import FrameSampling
from ..prompt import Prompt
from .data import formats
from .data.datasets import RawSample
from .data.samples import SampleFormat
from .loop import open_jsonl

MAX_NEW_TOKENS = 64
THUMBNAIL_SIZE, MAX_FRAMES = 200, 4
"""Pixels of a logged image's longer side, and logged frames of a video."""


class GenerationLogger:
    """Answers the last question of each row.

    `questions.json` is written once, a line of `answers.jsonl` at each call. Without `out` nothing
    is written: for the ranks that only compute.
    """

    def __init__(
        self, rows: Sequence[RawSample], model: Path, form: SampleFormat, out: Path | None
    ) -> None:
        self.processor, self.out = formats.processor(model), out
        self.names = [row.name for row in rows]
        self.prompts: list[Prompt] = []
        questions = []
        for row in rows:
            messages, media = row.messages()
            self.prompts.append(form.question(self.processor, messages, media))
            questions.append(
                {
                    "name": row.name,
                    "question": _text(messages[-2]["content"]) if len(messages) > 1 else "",
                    "truth": _text(messages[-1]["content"]),
                    "images": _thumbnails(self.prompts[-1], self.processor),
                }
            )
        if rows and out:
            (out / "questions.json").write_text(json.dumps(questions), "utf-8")

    def __call__(self, model: Llava, step: int, log: Callable[[str], None]) -> None:
        """Answer all questions, greedily."""
        if not self.prompts:
            return
        answers = generate(model, self.processor, self.prompts, MAX_NEW_TOKENS)
        if self.out:
            with open_jsonl(self.out / "answers.jsonl") as file:
                file.write(json.dumps({"step": step, "answers": answers}) + "\n")
        for name, answer in zip(self.names, answers, strict=True):
            log(f"step {step:,} {name}: {answer}")


def generate(
    model: Llava, processor: Processor, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[str]:
    """The greedy answers of a model in training."""
    if not prompts:
        return []
    tokenizer, config = processor.tokenizer, model.config.text
    limits = [max(1, min(max_new_tokens, config.context - len(prompt))) for prompt in prompts]
    tokens = sum(len(prompt) + n for prompt, n in zip(prompts, limits, strict=True))
    engine = Engine(
        model,
        eos_ids=tokenizer.eos_ids,
        vocab=tokenizer.size,
        kv_bytes=tokens * bytes_per_token(config, model.language_model.norm.weight.dtype),
        feature_bytes=0,
        kv_block_size=0,
    )
    params = [SamplingParams(max_new_tokens=n) for n in limits]
    requests = engine.generate(prompts, params)
    return [tokenizer.decode(request.generated).strip() for request in requests]


def _text(content: object) -> str:
    """The text of a message, with `<image>` for each image."""
    (turn,) = parse([{"role": "user", "content": content}], FrameSampling())
    pieces = (
        piece
        for part in turn.parts
        for piece in ([part] if isinstance(part, MediaPlaceholder) else part)
    )
    return "".join("<image>" if isinstance(piece, MediaPlaceholder) else piece for piece in pieces)


def _thumbnails(prompt: Prompt, processor: Processor) -> list[str]:
    """The images of a prompt as data URLs: a few frames of a video, the whole image of tiles."""
    settings = processor.images
    mean, std = (torch.tensor(triple)[:, None, None] for triple in (settings.mean, settings.std))
    urls = []
    for media in prompt.media:
        every = -(-media.layout.crops // MAX_FRAMES)
        for crop in media.pixels_of(0, 1) if media.layout.tiles else media.pixels[::every]:
            levels = ((crop * std + mean) / settings.rescale).round().clamp(0, 255).to(torch.uint8)
            image = Image.fromarray(levels.permute(1, 2, 0).numpy())
            image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
            file = BytesIO()
            image.save(file, "JPEG", quality=80)
            urls.append(data_url.encode(file.getvalue(), "image/jpeg"))
    return urls
