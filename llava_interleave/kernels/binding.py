"""Choose the compiled library of this CPU's best instruction set, and bind it with ctypes.

The libraries are C: they work with every PyTorch, on its own thread pool where it exports
`torch_parallel_for` (2.10 and later do), so that no two pools compete for cores, else on threads of
their own, as many as PyTorch has. Where there is no library or the CPU lacks instructions,
`unavailable_reason` says so, and callers use PyTorch's operators."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from . import compilation

GROUP, SUBGROUP, PANEL = 128, 32, 16
"""Inputs that share a scale; inputs that share a sub_scale and a zero point, with 4 bits; outputs
that are packed together."""

_AVX2 = ("avx2", "fma3", "f16c")
_AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni")
CAPABILITIES = {
    "amx": (*_AVX512, "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    "avx512_bf16": (*_AVX512, "avx512_bf16"),
    "avx512_vnni": _AVX512,
    "avx_vnni": (*_AVX2, "avx_vnni"),
    "avx2": _AVX2,
    "neon_i8mm": ("neon", "dot", "i8mm"),
    "neon_dotprod": ("neon", "dot"),
}
"""Instruction set -> its names in `torch.cpu.get_capabilities`."""

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_LAYERS: list[Any] = [_LONG, _POINTER, _POINTER, ctypes.c_float]
ARGUMENTS: dict[str, list[Any]] = {
    "linear": [_INT, _INT, *[_POINTER] * 5, *[_LONG] * 3],
    "attend": [*[_POINTER] * 8, *[_LONG] * 6],
    "decode": [*_LAYERS, _POINTER, _LONG, *[_POINTER] * 3, _LONG],
    "encode": [*_LAYERS, _POINTER, _LONG],
    "packed_attention": [_LONG, *[_POINTER] * 6, *[_LONG] * 5],
    "packed_attention_backward": [_LONG, *[_POINTER] * 10, *[_LONG] * 5],
    "rms_norm": [_POINTER, _POINTER, ctypes.c_float, _POINTER, _POINTER, _LONG, _LONG],
    "rms_norm_backward": [*[_POINTER] * 6, _LONG, _LONG],
    "rotate": [*[_POINTER] * 3, ctypes.c_float, _POINTER, *[_LONG] * 3],
    "swiglu": [_INT, *[_POINTER] * 3, _LONG],
    "swiglu_backward": [_INT, *[_POINTER] * 5, _LONG],
}
"""Function of a compiled library -> its arguments after the pool of threads."""


def group_bytes(bits: int) -> int:
    """Bytes of one packed (panel, group) block."""
    return PANEL * GROUP * bits // 8 + (PANEL * GROUP // SUBGROUP if bits == 4 else 0)


class KernelsUnavailable(Exception):
    """Why there are no kernels on this machine."""


def unavailable_reason() -> str | None:
    """None where the kernels are ready, else the reason."""
    functions = library()
    return functions if isinstance(functions, str) else None


@cache
def multiplies_bfloat16() -> bool:
    """Whether PyTorch has a fast bfloat16 matrix product on this CPU (AVX-512 or AMX). Without, it
    takes a hundred times as long as in float32."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@cache
def library() -> dict[str, Callable[..., None]] | str:
    """The functions of `ARGUMENTS` by name, or the reason why there are none."""
    try:
        return bind(find_library(supported_instructions()[0]))
    except KernelsUnavailable as reason:
        return str(reason)


@cache
def supported_instructions() -> tuple[str, ...]:
    """The instruction sets of this CPU that the kernels are written for, best first; at least
    one."""
    if not compilation.flags():
        raise KernelsUnavailable(
            f"they are not written for {compilation.architecture()}, only for "
            f"{' and '.join(compilation.FLAGS)}"
        )
    if not hasattr(torch.cpu, "get_capabilities"):
        raise KernelsUnavailable(
            f"PyTorch {torch.__version__} does not report this CPU's instructions; newer releases "
            "do"
        )
    capabilities = torch.cpu.get_capabilities()
    found = [
        name
        for name in compilation.flags()
        if all(capabilities.get(needed) for needed in CAPABILITIES[name])
        and (name != "amx" or _allows_tiles())
    ]
    if not found:
        raise KernelsUnavailable(f"this CPU has none of {', '.join(compilation.flags())}")
    return tuple(found)


def _allows_tiles() -> bool:
    """Whether Linux lets this process use the tile registers of AMX, which it must ask for:
    `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`."""
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0


def find_library(instructions: str) -> Path:
    """The library of one instruction set: of the present sources in a checkout, the one that was
    installed otherwise."""
    if compilation.SOURCES.is_dir():
        path = compilation.library_path(instructions)
        if path.is_file():
            return path
        raise KernelsUnavailable(
            f"those of {compilation.SOURCES} are not compiled: run python {compilation.__file__}"
        )
    for path in compilation.FOLDER.glob(f"{instructions}-*"):
        return path
    raise KernelsUnavailable(
        "this installation has none: pip installs a wheel with kernels where there is one, or "
        "compiles them where there is a C++ compiler"
    )


def bind(path: Path) -> dict[str, Callable[..., None]]:
    """The functions of `ARGUMENTS` of a compiled library, by name."""
    try:
        compiled = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"{path} cannot be loaded: {error}") from error
    functions = {name: getattr(compiled, f"llava_{name}") for name in ARGUMENTS}
    for name, given in ARGUMENTS.items():
        functions[name].argtypes, functions[name].restype = [_POINTER, *given], None
    pool = torch_parallel_for()
    if pool is not None:
        return {name: partial(function, pool) for name, function in functions.items()}
    own = ctypes.cast(compiled.llava_parallel_for, _POINTER)
    compiled.llava_set_threads.argtypes = [_LONG]

    def on_own_threads(function: Callable[..., None], *args: object) -> None:
        compiled.llava_set_threads(torch.get_num_threads())
        function(own, *args)

    return {name: partial(on_own_threads, function) for name, function in functions.items()}


def torch_parallel_for() -> ctypes.c_void_p | None:
    """The address of PyTorch's function that runs a loop on its thread pool; None where it exports
    none."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return ctypes.cast(torch_cpu.torch_parallel_for, _POINTER)
    except (OSError, AttributeError):
        return None
