"""Processes that train one network together, as torchrun starts them. A process alone is the one rank of its run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import LlavaError, OptionError
from ..weights.load import device_named

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long ranks wait for each other: one reads all samples first. torchrun ends all when one dies."""


def place() -> tuple[int, int]:
    """Number of this process, and how many torchrun has started."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if dist.is_torchelastic_launched() else (0, 1)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all of a run. All ranks call the same methods in the same order."""

    rank: int = 0
    count: int = 1

    def total(self, *values: float) -> list[float]:
        """The sum of each over all ranks, in float64."""
        return self._reduced(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM)

    def most(self, *values: int) -> list[int]:
        """The largest of each over all ranks."""
        return self._reduced(torch.tensor(values), dist.ReduceOp.MAX)

    def _reduced(self, values: torch.Tensor, how: Any) -> list[Any]:
        if self.count > 1:
            dist.all_reduce(values, how)
        return values.tolist()

    def each(self, value: T) -> list[T]:
        """What every rank gives, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def once(self, do: Callable[[], T]) -> T:
        """What rank 0 finds by `do`, for all; a user's mistake that it finds there ends all."""
        if self.count == 1:
            return do()
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told[0] = do()
            except LlavaError as error:
                told[0] = error
        dist.broadcast_object_list(told)
        if isinstance(told[0], LlavaError):
            raise self.common(told[0])
        return told[0]

    def common(self, error: LlavaError) -> BaseException:
        """What to raise for an error that all ranks have: rank 0 tells it, the others end without a word."""
        return SystemExit(error.exit_code) if self.rank else error


def joined(device: str) -> tuple[Ranks, torch.device]:
    """This process among those that torchrun started with it, and its device; `auto` is CUDA where there is any.

    It stays joined to them, whatever it does next. Raises OptionError where several are to share one device, Unsupported for a
    device that is not there.
    """
    ranks = Ranks(*place())
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if ranks.count == 1:
        return ranks, device_named(name)
    if ":" in name:
        raise ranks.common(OptionError(f"{ranks.count} processes cannot share {name}: say cuda, and each takes one of its own"))
    found = device_named(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo", timeout=PATIENCE)
    return ranks, found
