"""A GPU as far as a CPU can be one: a device that is behind the host, and the kernels' formulas."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava_interleave.engine import device_stream
from llava_interleave.engine.device_stream import DeviceStream, Download
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.prompt import Media, Prompt


class Graph:
    """Runs a step again in the tensors that it was captured in. Graphs share memory: what others
    found is gone then.
    """

    def __init__(self, step: Callable[[], Any], others: list[Graph]) -> None:
        self.step, self.others, self.replays = step, others, 0
        self.found = self.computed()

    def computed(self) -> Any:
        found = self.step()
        for other in self.others:
            for tensor in _tensors(other.found):
                tensor.fill_(-1)
        return found

    def replay(self) -> None:
        self.replays += 1
        for old, new in zip(_tensors(self.found), _tensors(self.computed()), strict=True):
            old.copy_(new)


def _tensors(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


class SimulatedDevice(DeviceStream):
    """A device that does nothing before the host waits for it, or works on its memory.

    Copies and launches are queued. Host memory holds garbage: new one until it is written, and that
    of a copy from the device until its event is waited for. A copy to the device reads it when its
    turn comes. Any operator on other tensors than host memory comes after all that is queued, as in
    the stream of a GPU.
    """

    no_capture = None

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.queue: deque[Callable[[], object]] = deque()
        self.graphs: list[Graph] = []
        self.host_memory: dict[int, Tensor] = {}
        self.working = False
        self.ahead = 0  # launches while others were queued

    def active(self) -> AbstractContextManager[Any]:
        return _InOrder(self)

    def host(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return self._garbage(torch.empty(shape, dtype=dtype))

    def _garbage(self, tensor: Tensor) -> Tensor:
        self.host_memory[tensor.untyped_storage().data_ptr()] = tensor
        return tensor.fill_(0x5A)

    def upload(self, host: Tensor, target: Tensor | None = None) -> Tensor:
        there = torch.empty(host.shape, dtype=host.dtype) if target is None else target
        self.queue.append(lambda: there.copy_(host))
        return there

    def download(self, source: Tensor) -> Download:
        there, host = (torch.empty(source.shape, dtype=source.dtype) for _ in range(2))
        self._garbage(host)

        def copy() -> None:
            there.copy_(source)

        def wait() -> None:
            while copy in self.queue:
                self._next()
            self._do(lambda: host.copy_(there))

        self.queue.append(copy)
        return Download(host, wait)

    def launch(self, work: Callable[[], object]) -> None:
        self.ahead += len(self.queue) > 3  # what one step queues before its launch
        self.queue.append(work)

    def capture(self, step: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        self.synchronize()
        self._do(lambda: self.graphs.append(Graph(step, list(self.graphs))))
        return self.graphs[-1].replay, self.graphs[-1].found

    def synchronize(self) -> None:
        while self.queue:
            self._next()

    def _next(self) -> None:
        self._do(self.queue.popleft())

    def _do(self, work: Callable[[], object]) -> None:
        self.working = True
        try:
            work()
        finally:
            self.working = False


MAY_COPY = ("to", "contiguous", "reshape", "flatten")
"""Operators that count as views in inference mode, and copy where they have to."""


class _InOrder(TorchDispatchMode):
    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.device.working:
            return func(*args, **kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        tensors += [x for xs in args if isinstance(xs, list | tuple) for x in xs if _is(x)]
        known = self.device.host_memory
        on_device = any(x.untyped_storage().data_ptr() not in known for x in tensors)
        if on_device and not (func.is_view and func.overloadpacket.__name__ not in MAY_COPY):
            self.device.synchronize()
        return func(*args, **kwargs)


def _is(x: object) -> bool:
    return isinstance(x, Tensor)


def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paged engines compute by the functions of the Triton kernels, as on a GPU."""
    monkeypatch.setattr("llava_interleave.engine.kv_paged.unavailable_reason", lambda *_: None)


def simulated(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedDevice]:
    """The devices of all engines that are made from now on, as if there were a GPU."""
    devices: list[SimulatedDevice] = []

    def stream_of(device: torch.device) -> SimulatedDevice:
        devices.append(SimulatedDevice(device))
        return devices[-1]

    kernels_on_cpu(monkeypatch)
    monkeypatch.setattr(device_stream, "stream_of", stream_of)
    monkeypatch.setattr("llava_interleave.engine.model_runner.stream_of", stream_of)
    return devices


def prompt(seed: int, words: int, images: int) -> Prompt:
    """Random words, then images of 12 pixels with 9 tokens each, then a word of the seed."""
    random, layout = torch.Generator().manual_seed(seed), ImageTokenLayout(3)
    tokens, media = torch.randint(0, 57, (words,), generator=random).tolist(), []
    for image in range(images):
        pixels = torch.randn(1, 3, 12, 12, generator=random)
        media.append(Media(pixels, layout, f"{seed}.{image}".encode(), len(tokens)))
        tokens += [60] * layout.length
    return Prompt([*tokens, seed], tuple(media))
