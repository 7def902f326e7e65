"""Ours against transformers here, in float32: token ids, pixels, tower, projector, every layer, logits, greedy tokens."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..chat import locate
from ..checkpoints import stored_precision
from ..processing import Processor
from ..prompt import Prompt
from . import candidate, reference
from .candidate import LINEARS, LayerDiff, Stages, measured

TOLERANCE = 1e-4
"""What rounding in float32 explains, relative to the largest value."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What is asked of two sides besides equal ids and pixels.

    within: how far a logit may be off, relative to the largest one where that is above 1. greedy: whether all greedy tokens must
    be equal. told: what the other side is, in words.
    """

    within: float
    greedy: bool
    told: str

    def __str__(self) -> str:
        logits = (
            f", logits within {self.within:g} of the largest one" if isfinite(self.within) else ""
        )
        own = (
            ", equal greedy tokens"
            if self.greedy
            else f", every quantized linear within {TOLERANCE:g} of what its integers say"
        )
        return f"equal ids, equal pixels{logits}{own}"


EXACT = Tolerance(TOLERANCE, True, "transformers, float32")
# Where a float's last digit makes the two sides round an input apart, it is off by a step, 1/127 of its group's largest, and what
# follows is not near any more; so each linear is also asked alone, given what the other way of computing it is given.
ROUNDED = Tolerance(
    0.1, False, "transformers, float32, with these weights as floats and inputs rounded to 8 bits"
)
COST = Tolerance(inf, False, "transformers, float32, with other weights")


@dataclass(frozen=True, slots=True)
class ParityCase:
    """One prompt on both sides.

    prompt: its length in tokens. ids: whether both made the same token ids of it: template and tokenizer. stages: from pixels to
    logits, none beyond the pixels where ids differ; then `LINEARS`, of quantized weights. kl: divergence of the first answer
    token's distribution, in nats; None where ids or vocabularies differ. same: how many of the `tokens` greedy tokens agree
    before the first that differs. ours, theirs: those tokens as text.
    """

    name: str
    standard: Tolerance
    prompt: int
    ids: bool
    stages: tuple[LayerDiff, ...]
    kl: float | None
    same: int
    tokens: int
    ours: str
    theirs: str

    def has(self, name: str) -> bool:
        return any(stage.name == name for stage in self.stages)

    def stage(self, name: str) -> LayerDiff:
        """A stage by name; one that was not reached is infinitely wrong."""
        return next(
            (stage for stage in self.stages if stage.name == name),
            LayerDiff(name, float("inf"), 0.0),
        )

    def told(self) -> dict[str, Any]:
        """As JSON has it: an infinite difference is null."""
        stages = [
            {
                "name": s.name,
                "error": s.error if isfinite(s.error) else None,
                "relative": s.relative if isfinite(s.error) else None,
            }
            for s in self.stages
        ]
        return {
            **asdict(self),
            "standard": str(self.standard),
            "stages": stages,
            "passed": self.passed,
        }

    @property
    def images(self) -> bool:
        return self.has("pixels")

    @property
    def passed(self) -> bool:
        logits, pixels = self.stage("logits"), self.stage("pixels").error if self.images else 0.0
        near = logits.error <= self.standard.within * max(1.0, logits.largest)
        linears = not self.has(LINEARS) or self.stage(LINEARS).relative <= TOLERANCE
        return (
            self.ids
            and pixels == 0
            and near
            and linears
            and (self.same == self.tokens or not self.standard.greedy)
        )


def verify(
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    against: str | Path | None = None,
    tokens: int = 32,
) -> list[ParityCase]:
    """Compare a checkpoint folder or Hugging Face name, or the built-in model, with transformers on text, images, several turns.

    adapter: beside the network, there by PEFT. A quantized folder is compared with its own weights as floats and with the same
    rounding of inputs, which asks whether it is computed right. against: the checkpoint that transformers reads instead; the one
    that a quantized folder was made from tells what its rounding costs, of which nothing is asked.
    Both networks are held in float32, one after the other. Raises `Unsupported` if transformers, or PEFT, is not installed.
    """
    folder, beside = locate(name, revision), locate(adapter, None) if adapter else None
    reference.library(beside)
    processor = Processor.from_folder(folder)
    chats = conversations()
    prompts = {case: processor.prompt(chat, preset="hf") for case, chat in chats.items()}
    network = candidate.load(folder, processor, beside)
    made = {
        case: (network.stages(prompt), network.greedy(prompt, tokens))
        for case, prompt in prompts.items()
    }
    alone = {case: network.linears(prompt) for case, prompt in prompts.items()}
    del network
    gc.collect()
    other = folder if against is None else locate(against, None)
    standard = EXACT if not stored_precision(folder) else ROUNDED if against is None else COST
    hf = reference.load(other, processor, beside, eight_bits=standard is ROUNDED)
    return [
        compare(
            case,
            standard,
            processor,
            prompts[case],
            made[case],
            hf.answer(chats[case], tokens),
            alone[case],
        )
        for case in chats
    ]


def conversations() -> dict[str, list[dict[str, Any]]]:
    """What is asked on both sides: text alone, one image, several, and a second turn with another image."""
    a, b, c = (picture(seed) for seed in range(3))
    several = [turn("user", "What changed between these pictures?", a, b, c)]
    turns = [
        turn("user", "What is this?", a),
        turn("assistant", "A picture."),
        turn("user", "And this one?", b),
    ]
    return {
        "text only": [turn("user", "What is the capital of France?")],
        "one image": [turn("user", "What is in the picture?", a)],
        "three images": several,
        "two turns": turns,
    }


def turn(role: str, text: str, *images: Image.Image) -> dict[str, Any]:
    return {
        "role": role,
        "content": [
            *({"type": "image", "image": image} for image in images),
            {"type": "text", "text": text},
        ],
    }


def picture(seed: int) -> Image.Image:
    """A picture of coloured waves, 97 + 40 x seed pixels wide: smooth and sharp parts, and no side of the tower's size."""
    width, height = 97 + 40 * seed, 131
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = torch.stack(
        [
            torch.sin((3 + seed) * x * (k + 2)) * torch.cos((5 - seed) * y * (k + 1))
            for k in range(3)
        ],
        dim=-1,
    )
    waves[height // 3 : height // 2, width // 4 : width // 2] = torch.tensor([1.0, -1.0, 0.5]) * (
        1 if seed % 2 else -1
    )
    return Image.fromarray(((waves + 1) * 127.5).to(torch.uint8).numpy())


def compare(
    name: str,
    standard: Tolerance,
    processor: Processor,
    prompt: Prompt,
    ours: tuple[Stages, list[int]],
    theirs: tuple[list[int], Stages, list[int]],
    alone: tuple[LayerDiff, ...] = (),
) -> ParityCase:
    (our_stages, our_tokens), (ids, stages, tokens) = ours, theirs
    same_ids = prompt.tokens == ids
    names = [stage for stage in our_stages | stages if same_ids or stage == "pixels"]
    nothing, size = torch.zeros(0), processor.tokenizer.size
    alike = same_ids and our_stages["logits"].shape == stages["logits"].shape
    return ParityCase(
        name,
        standard,
        len(prompt),
        same_ids,
        (
            *(
                measured(stage, our_stages.get(stage, nothing), stages.get(stage, nothing))
                for stage in names
            ),
            *alone,
        ),
        divergence(stages["logits"][-1, :size], our_stages["logits"][-1, :size]) if alike else None,
        agreeing(our_tokens, tokens),
        max(len(our_tokens), len(tokens)),
        *(processor.tokenizer.decode(written) for written in (our_tokens, tokens)),
    )


def divergence(theirs: Tensor, ours: Tensor) -> float:
    """Kullback-Leibler divergence, in nats, of the distribution with our logits from that with theirs."""
    p, q = theirs.double().log_softmax(dim=-1), ours.double().log_softmax(dim=-1)
    return max(0.0, float((p.exp() * (p - q)).sum()))


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens agree before the first that differs."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
