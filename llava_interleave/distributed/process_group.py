"""The processes that torchrun started, and their collectives. A single process is rank 0 of a world
of size 1."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LlavaError, OptionError

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(days=30)
"""How long a rank waits in a collective: rank 0 reads all samples first, or waits for a user.
torchrun stops all ranks when one dies."""


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process, and the number of processes that torchrun started; (0, 1) without
    torchrun."""
    return (
        (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        if dist.is_torchelastic_launched()
        else (0, 1)
    )


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """All processes of a run. Every rank calls the same methods in the same order."""

    rank: int = 0
    world_size: int = 1

    def all_reduce_sum(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, in float64."""
        return self._all_reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM)

    def all_reduce_max(self, *values: int) -> list[int]:
        """The maximum of each value over all ranks."""
        return self._all_reduce(torch.tensor(values), dist.ReduceOp.MAX)

    def _all_reduce(self, values: Tensor, op: Any) -> list[Any]:
        if self.world_size > 1:
            dist.all_reduce(values, op)
        return values.tolist()

    def all_reduce_(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The `x` of every rank, in the order of ranks; all have one shape."""
        if self.world_size == 1:
            return [x]
        tensors = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for _ in range(self.world_size)
        ]
        dist.all_gather(tensors, x.contiguous())
        return tensors

    def all_gather_object(self, value: T) -> list[T]:
        """The value of every rank, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any = None) -> Any:
        """The value of rank 0, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def run_on_rank0(self, fn: Callable[[], T]) -> T:
        """Run `fn` on rank 0 and broadcast its result; a `LlavaError` raised there is raised on
        every rank."""
        if self.world_size == 1:
            return fn()
        result: Any = None
        if self.rank == 0:
            try:
                result = fn()
            except LlavaError as error:
                result = error
        result = self.broadcast(result)
        if isinstance(result, LlavaError):
            self.raise_everywhere(result)
        return result

    def raise_everywhere(self, error: LlavaError, cause: BaseException | None = None) -> NoReturn:
        """Raise an error that all ranks have: rank 0 reports it, the others exit silently with its
        exit code."""
        raise (SystemExit(error.exit_code) if self.rank else error) from cause


def init_distributed(
    device: str, get_device: Callable[[str], torch.device]
) -> tuple[ProcessGroup, torch.device]:
    """Join the process group that torchrun started, until the program ends; -> the group, and this
    rank's device.

    device: `auto` is CUDA where it is available. get_device: turns a name into a device, or raises
    where it is not available. Raises `OptionError` where several processes would share one GPU."""
    group = ProcessGroup(*rank_and_world_size())
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if group.world_size == 1:
        return group, get_device(name)
    if ":" in name:
        group.raise_everywhere(
            OptionError(
                f"{group.world_size} processes cannot share {name}; use device cuda, and each "
                "takes its own GPU"
            )
        )
    own = get_device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" else name)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT
        )
        atexit.register(_leave)
    return group, own


def _leave() -> None:
    """Left to the interpreter's exit, its threads would abort where another process has ended
    before."""
    if dist.is_initialized():
        dist.destroy_process_group()
