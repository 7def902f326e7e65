"""Compile the kernels at their first use, and bind them with ctypes.

The C++ sources include nothing of PyTorch: they compile in seconds, and the library works with
every release that exports its thread pool (`torch_parallel_for`), so that no two pools compete for
cores. The library is stored in the user's cache under a hash of sources, flags and compiler. Where
a compiler, the thread pool or CPU instructions are missing, `unavailable_reason` says which, and
callers use PyTorch's operators."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import platformdirs
import torch

GROUP, SUBGROUP, PANEL = 128, 32, 16
"""Inputs that share a scale; inputs that share a sub_scale and a zero point, with 4 bits; outputs
that are packed together."""

SOURCES = Path(__file__).with_name("csrc")
MAIN = SOURCES / "layers.cpp"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
AVX512_BF16 = (*AVX512, "-mavx512bf16")
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


def group_bytes(bits: int) -> int:
    """Bytes of one packed (panel, group) block."""
    return PANEL * GROUP * bits // 8 + (PANEL * GROUP // SUBGROUP if bits == 4 else 0)


class KernelsUnavailable(Exception):
    """Why there are no kernels on this machine."""


def unavailable_reason() -> str | None:
    """None where the kernels are ready, else the reason. The first call compiles them, which takes
    seconds."""
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
def library() -> tuple[Callable[..., None], ...] | str:
    """The functions `linear`, `attend`, `decode` and `encode`, or the reason why there are none."""
    try:
        return bind(compile_kernels(cpu_flags()))
    except KernelsUnavailable as reason:
        return str(reason)


def bind(path: Path) -> tuple[Callable[..., None], ...]:
    """`llava_linear`, `llava_attend`, `llava_decode` and `llava_encode` of a compiled file, on
    PyTorch's thread pool."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel_for = ctypes.cast(torch_cpu.torch_parallel_for, _POINTER)
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(
            f"PyTorch {torch.__version__} does not export its thread pool; 2.10 and later do"
        ) from error
    compiled = ctypes.CDLL(str(path))
    functions = (
        compiled.llava_linear,
        compiled.llava_attend,
        compiled.llava_decode,
        compiled.llava_encode,
    )
    layers: list[Any] = [_POINTER, _LONG, _POINTER, _POINTER, ctypes.c_float]
    functions[0].argtypes = [_POINTER, _INT, _INT, *[_POINTER] * 5, *[_LONG] * 3]
    functions[1].argtypes = [*[_POINTER] * 9, *[_LONG] * 6]
    functions[2].argtypes = [*layers, _POINTER, _LONG, *[_POINTER] * 3, _LONG]
    functions[3].argtypes = [*layers, _POINTER, _LONG]
    for function in functions:
        function.restype = None
    return tuple(partial(function, parallel_for) for function in functions)


def cpu_flags() -> tuple[str, ...]:
    """The compiler's flags for the best instruction set of this CPU that the kernels are written
    for."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise KernelsUnavailable(
            f"they are written for x86-64 on Linux, and this is {platform.machine()} on "
            f"{sys.platform}"
        )
    if not hasattr(torch.cpu, "get_capabilities"):
        raise KernelsUnavailable(
            f"PyTorch {torch.__version__} does not report this CPU's instructions; newer releases "
            "do"
        )
    capabilities = torch.cpu.get_capabilities()
    if all(
        capabilities.get(name)
        for name in ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni")
    ):
        return AVX512_BF16 if capabilities.get("avx512_bf16") else AVX512
    if all(capabilities.get(name) for name in ("avx2", "fma3", "f16c")):
        return AVX2
    raise KernelsUnavailable("this CPU has neither AVX-512 VNNI nor AVX2")


def compile_kernels(flags: tuple[str, ...], folder: Path | None = None) -> Path:
    """The sources compiled with these flags, in `folder` or the user's cache; compiled now if they
    are not there."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise KernelsUnavailable(
            "there is no C++ compiler (c++, g++ or clang++) to compile them with"
        )
    folder = folder or cache_folder()
    command = [compiler, "-std=c++17", "-O3", "-fPIC", "-shared", *flags]
    state = hashlib.blake2b(repr(command).encode(), digest_size=8)
    for source in sorted(SOURCES.glob("*.[ch]*")):
        state.update(source.read_bytes())
    path = folder / f"kernels-{state.hexdigest()}.so"
    if path.is_file():
        return path
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / path.name
            result = subprocess.run(
                [*command, "-o", str(output), str(MAIN)], capture_output=True, text=True
            )
            if result.returncode:
                message = (result.stderr.strip() or "no message").splitlines()[0][:200]
                raise KernelsUnavailable(f"{compiler} failed: {message}")
            return output.replace(path)
    except OSError as error:
        raise KernelsUnavailable(
            f"they cannot be compiled into {folder}: {error.strerror}"
        ) from error


def cache_folder() -> Path:
    """The user's cache of compiled kernels. Its libraries are executed, so nobody else may be able
    to write to it."""
    folder = platformdirs.user_cache_path("llava-interleave", appauthor=False)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise KernelsUnavailable(f"cannot create {folder}: {error.strerror}") from error
    if sys.platform != "win32" and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise KernelsUnavailable(
            f"other users can write to {folder}, whose libraries are executed; own it, and chmod "
            "go-w"
        )
    return folder
