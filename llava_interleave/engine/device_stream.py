"""Launches and copies of one device, in their order.

A GPU runs behind the host: a copy to it reads the host's memory later, and a copy from it has
written the host's memory only once its event has happened. All that the engine does without waiting
goes through a `DeviceStream`, so that tests can put a slow device in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Download:
    """A copy from the device to the host, which may still be under way."""

    def __init__(self, host: Tensor, wait: Callable[[], object] | None = None) -> None:
        self._host, self._wait = host, wait

    def wait(self) -> Tensor:
        """The values on the host. Waits for this copy, not for what was launched after it."""
        if self._wait is not None:
            self._wait()
        return self._host


class DeviceStream:
    """A device that does everything at once, as a CPU does.

    no_capture: why launches cannot be captured in a CUDA graph, or None.
    """

    no_capture: str | None = "no CUDA device"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def active(self) -> AbstractContextManager[Any]:
        """The context of all work on the device."""
        return nullcontext()

    def host(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """New memory of the host to copy from, with any values. Write to it before `upload` only:
        that may read it any time later."""
        return torch.empty(shape, dtype=dtype)

    def upload(self, host: Tensor, target: Tensor | None = None) -> Tensor:
        """Copy memory of `host()` to the device, to `target` or to new memory."""
        behind = self.device.type == "cuda"
        if target is None:
            return host.to(self.device, non_blocking=behind)
        return target.copy_(host, non_blocking=behind)

    def upload_numbers(self, numbers: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """A tensor of numbers on the device."""
        host = self.host(len(numbers), dtype=dtype)
        host[:] = torch.tensor(numbers, dtype=dtype)
        return self.upload(host)

    def download(self, source: Tensor) -> Download:
        """Copy a tensor of the device as it is after all launches so far."""
        return Download(source.to("cpu", copy=True))

    def launch(self, work: Callable[[], object]) -> None:
        """Do work on the device after all that was launched before, at a time of its own."""
        work()

    def capture(self, step: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """Work that computes `step` again into the same outputs, and these outputs.

        Graphs of a stream share memory for what they compute in between. Raises RuntimeError.
        """
        raise RuntimeError(self.no_capture)

    def event(self, clock: Callable[[], float]) -> Any:
        """Now: the time at which the device has done all launches so far."""
        return clock()

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two events. Waits for the second."""
        return float(end - begin)

    def synchronize(self) -> None:
        """Wait for all launches so far."""


class CudaStream(DeviceStream):
    """The current stream of a CUDA device, and a stream of its own to capture graphs in.

    `torch.cuda.graph` alone would capture in a stream of the device that was current when the
    process first did so, and record nothing on another one (pytorch issue 87894).
    """

    no_capture = None

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        with torch.cuda.device(device):
            self._side = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def active(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device)  # where Triton launches

    def host(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def download(self, source: Tensor) -> Download:
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        host.copy_(source, non_blocking=True)
        return Download(host, self._record().synchronize)

    def capture(self, step: Callable[[], T]) -> tuple[Callable[[], object], T]:
        current, side = torch.cuda.current_stream(self.device), self._side
        # the second context restores the stream also after a capture that fails
        with torch.cuda.device(self.device), torch.cuda.stream(current):
            side.wait_stream(current)
            with torch.cuda.stream(side):  # warm-up: libraries initialize on the first call
                step()
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may use the GPU meanwhile
            with torch.cuda.graph(
                graph, self._pool, stream=side, capture_error_mode="thread_local"
            ):
                outputs = step()
            current.wait_stream(side)
        return graph.replay, outputs

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def event(self, clock: Callable[[], float]) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()


def stream_of(device: torch.device) -> DeviceStream:
    """The stream of a device."""
    return CudaStream(device) if device.type == "cuda" else DeviceStream(device)
