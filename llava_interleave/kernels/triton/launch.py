"""Launches a kernel, on the GPU or in Triton's interpreter, and counts or records launches. Imports
Triton only to run one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels on CPU tensors. Triton reads it on import."""
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KiB of shared memory that a block can have, by compute capability (CUDA C++ programming guide,
table of technical specifications)."""
MULTIPROCESSORS = 132
"""Of an H100 and an H200; for devices that are none, such as the meta device."""


class Launch(NamedTuple):
    """name: module and function of the kernel. arguments: tensors, numbers and None. constants:
    arguments that the kernel is compiled for."""

    name: str
    arguments: tuple[Tensor | float | None, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)
_capability: ContextVar[int] = ContextVar("capability", default=90)


@contextmanager
def record_launches(capability: int = 90) -> Iterator[list[Launch]]:
    """The launches in this context, also on the meta device.

    capability: of the GPU that the meta device stands for."""
    launches: list[Launch] = []
    tokens = _recorded.set(launches), _capability.set(capability)
    try:
        yield launches
    finally:
        _recorded.reset(tokens[0])
        _capability.reset(tokens[1])


def runs_kernel(x: Tensor) -> bool:
    """Whether a kernel is launched for this tensor, or recorded; float64 is for the formulas."""
    return (x.is_cuda or x.is_meta or (INTERPRETED and x.is_cpu)) and x.dtype != torch.float64


def launch(
    name: str,
    grid: tuple[int, ...],
    *arguments: Tensor | float | None,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Run a kernel on the device of its first argument."""
    x = arguments[0]
    assert isinstance(x, Tensor)
    device, pdl = x.device, capability(x) >= 90 and not x.is_cpu
    constants = {**constants, "PDL": pdl}
    if (launches := _recorded.get()) is not None:
        launches.append(Launch(name, arguments, constants, num_warps, num_stages))
    if device.type == "meta" or 0 in grid:
        return
    run = kernel(name)[grid]
    if device.type == "cpu":
        _multiply_bfloat16()
        run(*arguments, **constants)
        return
    with torch.cuda.device(device):  # Triton launches on the current one
        options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": pdl}
        run(*arguments, **constants, **options)


@cache
def kernel(name: str) -> Any:
    """A kernel by module and function, as `Launch.name`."""
    module, function = name.split(".")
    return getattr(import_module(f".{module}", __package__), function)


@cache
def _multiply_bfloat16() -> None:
    """Triton's interpreter keeps bfloat16 numbers as bits, and `tl.dot` multiplies these (3.9)."""
    from triton.runtime.interpreter import InterpreterBuilder, tl

    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        if a.dtype == tl.bfloat16:
            a, b = (self.create_fp_ext(x, tl.float32) for x in (a, b))
        return dot(self, a, b, *arguments)

    InterpreterBuilder.create_dot = create_dot


def specialization(launched: Launch) -> dict[str, tuple[Any, bool] | None]:
    """What a kernel is compiled for, by argument: its type, and whether it or its address is known
    to be a multiple of 16; None for a constant, as None and 1 are too.

    Triton compiles a kernel again where that differs."""
    function, arguments = kernel(launched.name), iter(launched.arguments)
    changing = getattr(function, "kwargs", vars(function))["do_not_specialize"] or ()
    found: dict[str, tuple[Any, bool] | None] = {}
    for name in function.arg_names:
        value = None if name in launched.constants else next(arguments)
        if isinstance(value, Tensor):
            found[name] = value.dtype, value.storage_offset() * value.itemsize % 16 == 0
        elif value is None or (value == 1 and name not in changing):
            found[name] = None
        else:
            multiple = isinstance(value, int) and value % 16 == 0
            found[name] = type(value), multiple and name not in changing
    return found


def capability(x: Tensor) -> int:
    """Of its GPU, or the one below it in `SHARED_MEMORY`: what the sizes of blocks depend on."""
    own = _cuda_capability(x.device) if x.is_cuda else _capability.get()
    return max(known for known in SHARED_MEMORY if known <= own)


def multiprocessors(x: Tensor) -> int:
    return _multiprocessors(x.device) if x.is_cuda else MULTIPROCESSORS


@cache
def _cuda_capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
