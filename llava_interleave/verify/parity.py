"""Parity with transformers in float32: token ids, pixels, tower, projector, layers, logits, greedy
tokens.
"""

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
from ..checkpoints import Checkpoint
from ..processing import Processor
from ..prompt import Prompt
from . import candidate, reference
from .candidate import LINEARS, LayerDiff, LayerOutputs, layer_diff

TOLERANCE = 1e-4
"""What rounding in float32 explains, relative to the largest value."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What two sides must have in common besides equal ids and pixels.

    logits: largest difference of a logit, relative to the largest logit where that is above 1.
    greedy: whether all greedy tokens must be equal. reference: the other side, in words.
    """

    logits: float
    greedy: bool
    reference: str

    def __str__(self) -> str:
        logits = (
            f", logits within {self.logits:g} of the largest one" if isfinite(self.logits) else ""
        )
        own = (
            ", equal greedy tokens"
            if self.greedy
            else f", every quantized linear within {TOLERANCE:g} of the product with its integers"
        )
        return f"equal ids, equal pixels{logits}{own}"


EXACT = Tolerance(TOLERANCE, True, "transformers, float32")
# Where the last digit of a float makes the two sides round an input differently, that input is off
# by a step, 1/127 of the largest one in its group, and every layer after it differs more; so each
# linear is also compared alone, on equal inputs.
QUANTIZED = Tolerance(
    0.1, False, "transformers, float32, with these weights as floats and inputs rounded to 8 bits"
)
OTHER_WEIGHTS = Tolerance(inf, False, "transformers, float32, with other weights")


@dataclass(frozen=True, slots=True)
class ParityCase:
    """One prompt on both sides.

    prompt_tokens: length of the prompt. same_ids: whether template and tokenizer give both sides
    the same token ids. layers: from pixels to logits, only pixels where ids differ; then `LINEARS`,
    of quantized weights. kl: Kullback-Leibler divergence of the first answer token's distribution,
    in nats; None where ids or vocabularies differ. matching: how many of the `tokens` greedy tokens
    agree before the first that differs. candidate, reference: the greedy tokens of this package and
    of transformers, as text.
    """

    name: str
    tolerance: Tolerance
    prompt_tokens: int
    same_ids: bool
    layers: tuple[LayerDiff, ...]
    kl: float | None
    matching: int
    tokens: int
    candidate: str
    reference: str

    def has(self, name: str) -> bool:
        return any(layer.name == name for layer in self.layers)

    def layer(self, name: str) -> LayerDiff:
        """A layer by name; one that was not reached has an infinite error."""
        return next(
            (layer for layer in self.layers if layer.name == name),
            LayerDiff(name, float("inf"), 0.0),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON: an infinite difference is null."""
        layers = [
            {
                "name": s.name,
                "error": s.error if isfinite(s.error) else None,
                "relative": s.relative if isfinite(s.error) else None,
            }
            for s in self.layers
        ]
        return {
            **asdict(self),
            "tolerance": str(self.tolerance),
            "layers": layers,
            "passed": self.passed,
        }

    @property
    def images(self) -> bool:
        return self.has("pixels")

    @property
    def passed(self) -> bool:
        logits, pixels = self.layer("logits"), self.layer("pixels").error if self.images else 0.0
        near = logits.error <= self.tolerance.logits * max(1.0, logits.largest)
        linears = not self.has(LINEARS) or self.layer(LINEARS).relative <= TOLERANCE
        return (
            self.same_ids
            and pixels == 0
            and near
            and linears
            and (self.matching == self.tokens or not self.tolerance.greedy)
        )


def verify(
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    against: str | Path | None = None,
    tokens: int = 32,
) -> list[ParityCase]:
    """Compare a checkpoint folder or Hugging Face name, or the built-in model, with transformers on
    text, images, several turns.

    adapter: used on both sides, by PEFT in transformers. A quantized folder is compared with its
    own weights as floats and with the same rounding of inputs, which tests its arithmetic. against:
    the checkpoint that transformers reads instead; with the one that a quantized folder was made
    from, the result is the loss by quantization, and no tolerance applies. Both networks are in
    float32, one after the other. Raises `Unsupported` if transformers, or PEFT, is not installed.
    """
    folder, adapter_folder = locate(name, revision), locate(adapter, None) if adapter else None
    reference.library(adapter_folder)
    processor = Processor.from_folder(folder)
    chats = conversations(videos=processor.config.video_token_id is not None)
    prompts = {case: processor.prompt(chat, preset="hf") for case, chat in chats.items()}
    network = candidate.load(folder, processor, adapter_folder)
    outputs = {
        case: (network.layers(prompt), network.greedy(prompt, tokens))
        for case, prompt in prompts.items()
    }
    alone = {case: network.linears(prompt) for case, prompt in prompts.items()}
    del network
    gc.collect()
    other = folder if against is None else locate(against, None)
    tolerance = (
        EXACT
        if not Checkpoint.open(folder).precision
        else QUANTIZED
        if against is None
        else OTHER_WEIGHTS
    )
    hf = reference.load(other, processor, adapter_folder, int8_activations=tolerance is QUANTIZED)
    return [
        compare(
            case,
            tolerance,
            processor,
            prompts[case],
            outputs[case],
            hf.answer(chats[case], tokens),
            alone[case],
        )
        for case in chats
    ]


def conversations(videos: bool = False) -> dict[str, list[dict[str, Any]]]:
    """The conversations of both sides: text alone, one image, several, a second turn with another
    image, and with `videos` a video before an image.
    """
    a, b, c = (sample_image(seed) for seed in range(3))
    several = [turn("user", "What changed between these pictures?", a, b, c)]
    turns = [
        turn("user", "What is this?", a),
        turn("assistant", "A picture."),
        turn("user", "And this one?", b),
    ]
    clip = {"type": "video", "video": [b, c]}
    moving = [turn("user", "What moves, and what is this?", a)]
    moving[0]["content"].insert(0, clip)
    return {
        "text only": [turn("user", "What is the capital of France?")],
        "one image": [turn("user", "What is in the picture?", a)],
        "three images": several,
        "two turns": turns,
        **({"video and image": moving} if videos else {}),
    }


def turn(role: str, text: str, *images: Image.Image) -> dict[str, Any]:
    return {
        "role": role,
        "content": [
            *({"type": "image", "image": image} for image in images),
            {"type": "text", "text": text},
        ],
    }


def sample_image(seed: int) -> Image.Image:
    """Colored waves, 97 + 40 x seed pixels wide: smooth and sharp parts, and no side of the tower's
    size.
    """
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
    tolerance: Tolerance,
    processor: Processor,
    prompt: Prompt,
    ours: tuple[LayerOutputs, list[int]],
    theirs: tuple[list[int], LayerOutputs, list[int]],
    alone: tuple[LayerDiff, ...] = (),
) -> ParityCase:
    (our_layers, our_tokens), (ids, layers, tokens) = ours, theirs
    same_ids = prompt.tokens == ids
    names = [layer for layer in our_layers | layers if same_ids or layer == "pixels"]
    missing, size = torch.zeros(0), processor.tokenizer.size
    comparable = same_ids and our_layers["logits"].shape == layers["logits"].shape
    return ParityCase(
        name,
        tolerance,
        len(prompt),
        same_ids,
        (
            *(
                layer_diff(layer, our_layers.get(layer, missing), layers.get(layer, missing))
                for layer in names
            ),
            *alone,
        ),
        kl_divergence(layers["logits"][-1, :size], our_layers["logits"][-1, :size])
        if comparable
        else None,
        matching_prefix(our_tokens, tokens),
        max(len(our_tokens), len(tokens)),
        *(processor.tokenizer.decode(written) for written in (our_tokens, tokens)),
    )


def kl_divergence(theirs: Tensor, ours: Tensor) -> float:
    """Kullback-Leibler divergence, in nats, of the distribution with our logits from that with
    theirs.
    """
    p, q = theirs.double().log_softmax(dim=-1), ours.double().log_softmax(dim=-1)
    return max(0.0, float((p.exp() * (p - q)).sum()))


def matching_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens agree before the first that differs."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
