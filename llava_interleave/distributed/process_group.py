"""Processes that share one network, as torchrun starts them. A process alone is the one rank of its run."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LlavaError, OptionError

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(days=30)
"""How long ranks wait for each other: one reads all samples first, or waits for a person. torchrun ends all when one dies."""


def place() -> tuple[int, int]:
    """Number of this process, and how many torchrun has started."""
    return (
        (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        if dist.is_torchelastic_launched()
        else (0, 1)
    )


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """This process among all of a run. All ranks call the same methods in the same order."""

    rank: int = 0
    count: int = 1

    def total(self, *values: float) -> list[float]:
        """The sum of each over all ranks, in float64."""
        return self._reduced(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM)

    def most(self, *values: int) -> list[int]:
        """The largest of each over all ranks."""
        return self._reduced(torch.tensor(values), dist.ReduceOp.MAX)

    def _reduced(self, values: Tensor, how: Any) -> list[Any]:
        if self.count > 1:
            dist.all_reduce(values, how)
        return values.tolist()

    def added(self, x: Tensor) -> Tensor:
        """The sum of tensors of one shape over all ranks, in the place of this one."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def gathered(self, x: Tensor) -> list[Tensor]:
        """Tensors of one shape, by rank."""
        if self.count == 1:
            return [x]
        found = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)
        ]
        dist.all_gather(found, x.contiguous())
        return found

    def each(self, value: T) -> list[T]:
        """What every rank gives, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def told(self, value: Any = None) -> Any:
        """What rank 0 gives, for all."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def once(self, do: Callable[[], T]) -> T:
        """What rank 0 finds by `do`, for all; a user's mistake that it finds there ends all."""
        if self.count == 1:
            return do()
        found: Any = None
        if self.rank == 0:
            try:
                found = do()
            except LlavaError as error:
                found = error
        found = self.told(found)
        if isinstance(found, LlavaError):
            raise self.common(found)
        return found

    def common(self, error: LlavaError) -> BaseException:
        """What to raise for an error that all ranks have: rank 0 tells it, the others end without a word."""
        return SystemExit(error.exit_code) if self.rank else error


def init_distributed(
    device: str, named: Callable[[str], torch.device]
) -> tuple[ProcessGroup, torch.device]:
    """This process among those that torchrun started with it, and its device; `auto` is CUDA where there is any.

    It stays joined to them, whatever it does next. named: finds a device, or raises for one that is not there. Raises
    OptionError where several are to share one device.
    """
    ranks = ProcessGroup(*place())
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if ranks.count == 1:
        return ranks, named(name)
    if ":" in name:
        raise ranks.common(
            OptionError(
                f"{ranks.count} processes cannot share {name}: say cuda, and each takes one of its own"
            )
        )
    found = named(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT
        )
        atexit.register(_leave)
    return ranks, found


def _leave() -> None:
    """Left to the end of the program, its threads abort it where another process has gone before."""
    if dist.is_initialized():
        dist.destroy_process_group()
