"""Hours and memory of the published stages on H100s, by `training_flops`: docs/training.md's table.

`python bench/train_cost.py` computes them from the shapes alone; nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from shapes import SHAPES

from llava_interleave.checkpoints import meta_network
from llava_interleave.flops import training_flops
from llava_interleave.model import Llava

PEAK = 989e12  # H100 SXM, dense bfloat16, by its data sheet
MFU = 0.4  # an assumption between two that others measured: docs/training.md
STATE = 12  # bytes of a trained parameter: gradient and two moments of AdamW, float32
WEIGHT = 4  # bytes of any parameter: float32, cast for each product
BATCH = 32768


@dataclass(frozen=True)
class Stage:
    """A mean sample: encoded images, tokens of the decoder's input, tokens with loss."""

    name: str
    samples: float
    images: int
    tokens: int
    answer: int
    tower: bool
    decoder: bool


STAGES = (
    Stage("align", 558e3, 1, 760, 25, False, False),
    Stage("instruct", 760e3, 5, 3200, 150, True, True),
    Stage("interleave", 1177.6e3, 6, 4600, 100, False, True),
    Stage("dpo", 3 * 17e3, 16, 2 * 12000, 2 * 100, True, True),  # both answers; three epochs
)


def part(model: Llava, stage: Stage) -> tuple[float, float, float]:
    """FLOPs of a sample, parameters, trained parameters."""
    model.requires_grad_(True)
    model.vision_tower.requires_grad_(stage.tower)
    model.language_model.requires_grad_(stage.decoder)
    model.lm_head.requires_grad_(stage.decoder)
    flops = training_flops(model, [stage.tokens], stage.images, stage.answer)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return flops, sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def main() -> None:
    for name in ("0.5b", "7b"):
        model = meta_network(SHAPES[name])
        text = SHAPES[name].text
        for stage in STAGES:
            flops, size, trained = part(model, stage)
            hours = flops * stage.samples / PEAK / MFU / 3600
            state = WEIGHT * size + STATE * trained
            kept = 2 * BATCH * text.hidden_size * text.num_layers  # the inputs of each layer
            memory = [(state / gpus + kept) / 2**30 for gpus in (1, 8, 16)]
            row = [f"{flops / 1e12:.0f} TFLOP", *(f"{hours / gpus:.1f} h" for gpus in (1, 8, 16))]
            print(name, stage.name, *row, *(f"{gib:.0f} GiB" for gib in memory), sep=" | ")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
