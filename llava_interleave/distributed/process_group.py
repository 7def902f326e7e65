"""The processes that torchrun started, and their collectives. A single process is rank 0 of a world
of size 1."""

from __future__ import annotations

import atexit
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from ..errors import LlavaError, OptionError, RemoteError

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(days=30)
"""How long a rank waits in a collective, where rank 0 waits for a user. torchrun ends all when one
dies. Training waits for minutes (`Recipe.timeout_minutes`)."""
HEARTBEAT = 5.0
"""Seconds between the heartbeats of a long `run_on_rank0`."""


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

    def run_on_rank0(self, fn: Callable[[], T], *, long: bool = False) -> T:
        """Run `fn` on rank 0 and broadcast its result; a `LlavaError` raised there is raised on
        every rank.

        long: it may take longer than a collective waits. Rank 0 then sends heartbeats, so that the
        others end when it ends, and not by their time-out."""
        if self.world_size == 1:
            return fn()
        result: Any = None
        if self.rank == 0:
            with self._heartbeats(long):
                try:
                    result = fn()
                except LlavaError as error:
                    result = error
        while long and not self.all_reduce_max(int(self.rank == 0))[0]:
            pass
        result = self.broadcast(result)
        if isinstance(result, LlavaError):
            self.raise_everywhere(result)
        return result

    @contextmanager
    def _heartbeats(self, enabled: bool) -> Iterator[None]:
        """Meanwhile a thread answers the collectives of the other ranks with 0."""
        done, failed = threading.Event(), []

        def beat() -> None:
            try:
                while not done.wait(HEARTBEAT):
                    self.all_reduce_max(0)
            except RuntimeError as error:
                failed.append(error)

        thread = threading.Thread(target=beat, daemon=True)
        if enabled:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if enabled:
                thread.join()
        if failed:
            raise failed[0]

    def raise_everywhere(self, error: LlavaError, cause: BaseException | None = None) -> NoReturn:
        """Raise an error that all ranks have: rank 0 reports it, the others exit silently with its
        exit code."""
        raise (SystemExit(error.exit_code) if self.rank else error) from cause


def init_distributed(
    device: str,
    get_device: Callable[[str], torch.device],
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> tuple[ProcessGroup, torch.device]:
    """Join the process group that torchrun started, until the program ends; -> the group, and this
    rank's device.

    device: `auto` is CUDA where it is available. get_device: turns a name into a device, or raises
    where it is not available. timeout: of every collective. Raises `OptionError` where several
    processes would share one GPU."""
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
        if link := _interface(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", link)
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
        with _store_of_this_start(group, timeout) as store:
            rank, size = (group.rank, group.world_size) if store else (-1, -1)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timeout
            )
        atexit.register(_leave)
    return group, own


@contextmanager
def _store_of_this_start(group: ProcessGroup, timeout: timedelta) -> Iterator[Any]:
    """A store without keys of earlier starts, while the ranks connect; None where it is new anyway.

    The TCPStore of torchrun's agent outlives the processes that are restarted: a rank could read
    the address of a rank 0 that has ended, and be refused until no restart is left. So each asks
    for the prefix of this start, and only a rank 0 that runs answers.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        yield None
        return
    store, *_ = next(rendezvous("env://", timeout=timeout))
    if group.rank:
        number = store.add("llava/asked", 1)
        yield PrefixStore(store.get(f"llava/answer/{number}").decode(), store)
        return
    prefix, done = uuid4().hex, threading.Event()
    other, *_ = next(rendezvous("env://", timeout=timeout))  # a store waits in one call only

    def answer() -> None:
        answered = 0
        while not done.wait(0.02):
            while answered < other.add("llava/asked", 0):
                answered += 1
                other.set(f"llava/answer/{answered}", prefix)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield PrefixStore(prefix, store)
    finally:  # gloo has connected all ranks
        done.set()
        thread.join()


def _interface(host: str, port: int) -> str | None:
    """The network interface by which this host reaches another.

    gloo takes the one of the host's name, which on Debian is the loopback."""
    if sys.platform == "win32":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        try:
            udp.connect((host, port))  # sends nothing
            address = udp.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    found = fcntl.ioctl(udp.fileno(), 0x8915, request)  # SIOCGIFADDR
                except OSError:  # it has no IPv4 address
                    continue
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
        except OSError:  # IPv6, or no route: gloo says so
            pass
    return None


@contextmanager
def lost_connections() -> Iterator[None]:
    """Errors of collectives, whose other side has ended or does not answer, as a `RemoteError`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
        if not dist.is_initialized() or not (
            isinstance(error, dist.DistError) or any(word in text for word in words)
        ):
            raise
        rank, world_size = rank_and_world_size()
        raise RemoteError(
            f"rank {rank} of {world_size} on {socket.gethostname()} lost another process "
            f"({text.splitlines()[0]}): its own message says why; the same command goes on from "
            "the last checkpoint"
        ) from error


def _leave() -> None:
    """Left to the interpreter's exit, its threads would abort where another process has ended
    before."""
    if dist.is_initialized():
        dist.destroy_process_group()
