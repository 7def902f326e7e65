"""What the model in training says to a few held-out questions, written down at every measurement."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from ..engine import Engine, SamplingParams, bytes_per_token
from ..model import Llava
from ..processing import Processor
from ..processing.chat_template import MediaPlaceholder, parse
from ..processing.video import FrameSampling
from ..prompt import Prompt
from . import formats
from .datasets import RawSample
from .loop import appending
from .samples import SampleFormat

LONGEST = 64
"""Most tokens of an answer."""
SIDE, FRAMES = 200, 4
"""Pixels of a picture's side as it is kept for people, and how many are kept of a video."""


class GenerationLogger:
    """Asks the last question of each row, and writes `questions.json` once and a line of `answers.jsonl` at each call.

    Without `out` nothing is written: by the ranks that only compute with the one that does.
    """

    def __init__(
        self, rows: Sequence[RawSample], model: Path, form: SampleFormat, out: Path | None
    ) -> None:
        self.processor, self.out = formats.processor(model), out
        self.names = [row.name for row in rows]
        self.prompts: list[Prompt] = []
        shown = []
        for row in rows:
            said, media = row.messages()
            self.prompts.append(form.question(self.processor, said, media))
            shown.append(
                {
                    "name": row.name,
                    "question": _text(said[-2]["content"]) if len(said) > 1 else "",
                    "truth": _text(said[-1]["content"]),
                    "pictures": _pictures(self.prompts[-1], self.processor),
                }
            )
        if rows and out:
            (out / "questions.json").write_text(json.dumps(shown), "utf-8")

    def __call__(self, model: Llava, step: int, say: Callable[[str], None]) -> None:
        """Answer all, greedily."""
        if not self.prompts:
            return
        tokenizer, text = self.processor.tokenizer, model.config.text
        room = [min(LONGEST, text.context - len(prompt)) for prompt in self.prompts]
        weight = model.language_model.norm.weight
        memory = sum(len(p) + n for p, n in zip(self.prompts, room, strict=True)) * bytes_per_token(
            text, weight.dtype
        )
        engine = Engine(
            model,
            eos_ids=tokenizer.eos_ids,
            vocab=tokenizer.size,
            kv_bytes=memory,
            feature_bytes=0,
            kv_block=0,
        )
        requests = engine.generate(self.prompts, [SamplingParams(max_new_tokens=n) for n in room])
        said = [tokenizer.decode(request.generated).strip() for request in requests]
        if self.out:
            with appending(self.out / "answers.jsonl") as file:
                file.write(json.dumps({"step": step, "answers": said}) + "\n")
        for name, answer in zip(self.names, said, strict=True):
            say(f"step {step:,} {name}: {answer}")


def _text(content: object) -> str:
    """The text of a message for people; a picture in it is its place."""
    (turn,) = parse([{"role": "user", "content": content}], FrameSampling())
    pieces = (
        piece
        for part in turn.parts
        for piece in ([part] if isinstance(part, MediaPlaceholder) else part)
    )
    return "".join("<image>" if isinstance(piece, MediaPlaceholder) else piece for piece in pieces)


def _pictures(prompt: Prompt, processor: Processor) -> list[str]:
    """The pictures of a prompt as data URLs, as the tower sees them: of a video a few frames, of tiles the whole."""
    settings = processor.images
    mean, std = (torch.tensor(triple)[:, None, None] for triple in (settings.mean, settings.std))
    found = []
    for item in prompt.media:
        crops = (
            item.pixels[:1] if item.layout.tiles else item.pixels[:: -(-len(item.pixels) // FRAMES)]
        )
        for crop in crops:
            levels = ((crop * std + mean) / settings.rescale).round().clamp(0, 255).to(torch.uint8)
            picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
            picture.thumbnail((SIDE, SIDE))
            file = BytesIO()
            picture.save(file, "JPEG", quality=80)
            found.append(
                "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
            )
    return found
