"""Prompts as planned, packed batches: data for tests of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llava_interleave.distributed.process_group import ProcessGroup
from llava_interleave.prompt import Prompt
from llava_interleave.train.data.packing import (
    PlannedPackedDataset,
    Position,
    distributed_batches,
)


class Prompts:
    """Example i is prompt i, counted on from the first one."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def __call__(self, index: int) -> Prompt:
        return self.prompts[index % len(self.prompts)]

    def length(self, index: int) -> int:
        return len(self(index))

    def images(self, index: int) -> int:
        return 0


class PackedBatches:
    """Batches of 400 prompts from a position on, `each` batches a step: the loop's `data`."""

    def __init__(self, prompts: Sequence[Prompt], *, tokens: int, each: int) -> None:
        self.plan = PlannedPackedDataset(Prompts(prompts), 400, size=8, tokens=tokens, seed=1)
        self.each = each

    def __call__(self, start: Position) -> Iterator[tuple[Any, Position]]:
        return distributed_batches(
            self.plan, start, workers=0, each=self.each, ranks=ProcessGroup()
        )
