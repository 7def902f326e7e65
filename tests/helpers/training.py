"""Prompts as planned, packed batches: data for tests of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from llava_interleave.distributed.process_group import ProcessGroup
from llava_interleave.prompt import Prompt
from llava_interleave.train import loop
from llava_interleave.train.data.packing import (
    PlannedPackedDataset,
    Position,
    distributed_batches,
)


class Killed(BaseException):
    """In the place of SIGKILL, which nothing can catch."""


@contextmanager
def killed_before(number: int) -> Iterator[None]:
    """A run inside it is killed before the step of this number, from 0 on."""
    step = loop.train_step

    def deadly(*words: Any) -> loop.StepStats:
        if words[5] == number:
            raise Killed
        return step(*words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", deadly)
        with pytest.raises(Killed):
            yield


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
