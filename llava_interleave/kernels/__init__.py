"""Compiled kernels for a CPU: products with quantised weights, attention, and a decoder's and a tower's layers made of both.
Compiled when first asked for.

The source is one C++ file that includes nothing of PyTorch: it compiles in seconds, and the result serves every release that
lends its threads (`torch_parallel_for`), so that no two pools of threads fight. It lies in the user's cache under a name made of
source, flags and compiler. Where a compiler, the threads or the instructions are missing, `why_not` says which, and callers use
PyTorch's operators.
"""

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

import torch
from torch import Tensor

GROUP, PART, PANEL = 128, 32, 16
"""Inputs that share a scale; with 4 bits those that share a step of it; outputs that lie together in memory."""

SOURCE = Path(__file__).with_name("kernels.cpp")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
_BFLOAT16 = (*_AVX512, "-mavx512bf16")
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


def group_bytes(bits: int) -> int:
    """Of a panel and a group."""
    return PANEL * GROUP * bits // 8 + (PANEL * GROUP // PART if bits == 4 else 0)


class NoKernels(Exception):
    """Why there are no kernels here."""


def unavailable_reason() -> str | None:
    """None where the kernels are ready, else the reason. The first call compiles them, which takes seconds."""
    found = _library()
    return found if isinstance(found, str) else None


@cache
def multiplies_bfloat16() -> bool:
    """Whether PyTorch multiplies matrices in bfloat16 on this CPU by more than single steps. Where not, which is without AVX-512
    or AMX, it takes a hundred times as long as in float32."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: int) -> Tensor:
    """`[..., in]` times a packed weight (see `model.quantise`), plus the bias: `[..., out]`, float32 or bfloat16 as `x` is."""
    features = x.shape[-1]
    panels, groups = -(-out // PANEL), -(-features // GROUP)
    bits = 4 if weight.shape[-1] == group_bytes(4) else 8
    assert weight.shape == (panels, groups, group_bytes(bits)), (x.shape, weight.shape, out)
    assert scale.shape == (panels, groups, PANEL), (weight.shape, scale.shape)
    assert (
        weight.is_contiguous()
        and scale.is_contiguous()
        and x.is_cpu
        and weight.is_cpu
        and scale.is_cpu
    ), weight.device
    assert (
        weight.dtype == torch.uint8
        and scale.dtype == torch.float16
        and x.dtype in (torch.float32, torch.bfloat16)
    ), x.dtype
    assert bias is None or (bias.shape == (out,) and bias.dtype == x.dtype), (
        bias.shape,
        bias.dtype,
        x.dtype,
    )
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    functions = _library()
    assert not isinstance(functions, str), functions
    functions[0](
        bits,
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // features,
        features,
        out,
    )
    return y


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    at: int,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What each q `[T, H, d]` of new tokens sees of the tokens up to its own, `[T, H, d]`, in bfloat16; d is a multiple of 16.

    Their k and v `[T, Hkv, d]` are put to the places from `at` on of keys `[Hkv, d, capacity]` and values `[Hkv, capacity, d]`
    first: bfloat16, or int8 with float16 scales `[Hkv, capacity]` for both. A token's result is the same in any company.
    """
    (tokens, heads, d), (kv_heads, capacity, _) = q.shape, values.shape
    assert d % PANEL == 0 and heads % kv_heads == 0 and 0 <= at <= capacity - tokens, (
        q.shape,
        values.shape,
        at,
    )
    assert k.shape == v.shape == (tokens, kv_heads, d) and keys.shape == (kv_heads, d, capacity), (
        k.shape,
        keys.shape,
    )
    assert {(t.dtype, t.is_cpu) for t in (q, k, v)} == {(torch.bfloat16, True)}, (q.dtype, q.device)
    assert (
        keys.dtype == values.dtype == (torch.int8 if scales else torch.bfloat16) and keys.is_cpu
    ), (keys.dtype, keys.device)
    assert all(
        t.shape == (kv_heads, capacity) and t.dtype == torch.float16 and t.is_contiguous()
        for t in scales or ()
    )
    assert keys.is_contiguous() and values.is_contiguous()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    pointers = (
        None if t is None else t.data_ptr()
        for t in (q, k, v, keys, values, *(scales or (None, None)), out)
    )
    functions = _library()
    assert not isinstance(functions, str), functions
    functions[1](*pointers, tokens, heads, kv_heads, d, capacity, at)
    return out


def decode(
    hidden: Tensor,
    weights: Tensor,
    shape: Tensor,
    eps: float,
    sequences: Tensor,
    rope: tuple[Tensor, Tensor],
) -> None:
    """What all layers of a decoder make of `[T, D]` hidden states in bfloat16, in place, in one call (see `model.fused`).

    weights, shape, sequences: int64, the kernel's structures of these names: addresses, and numbers of things. rope: `[T, 1, d]`.
    """
    assert {t.dtype for t in (weights, shape, sequences)} == {
        torch.int64
    } and hidden.dtype == torch.bfloat16, hidden.dtype
    assert all(
        t.is_contiguous() and t.is_cpu for t in (hidden, weights, shape, sequences, *rope)
    ) and len(rope[0]) == len(hidden)
    cos, sin = rope
    assert cos.shape == sin.shape and cos.dtype == sin.dtype == torch.bfloat16, (
        cos.shape,
        cos.dtype,
    )
    functions = _library()
    assert not isinstance(functions, str), functions
    threads, pointers = torch.get_num_threads(), (t.data_ptr() for t in (cos, sin, hidden))
    functions[2](
        threads,
        shape.data_ptr(),
        weights.data_ptr(),
        eps,
        sequences.data_ptr(),
        len(sequences),
        *pointers,
        len(hidden),
    )


def encode(hidden: Tensor, weights: Tensor, shape: Tensor, eps: float) -> None:
    """What all layers of an image tower make of the `[T, D]` hidden states of a crop in bfloat16, in place, in one call.

    weights, shape: int64, the kernel's structures of these names.
    """
    assert weights.dtype == shape.dtype == torch.int64 and hidden.dtype == torch.bfloat16, (
        hidden.dtype
    )
    assert all(t.is_contiguous() and t.is_cpu for t in (hidden, weights, shape))
    functions = _library()
    assert not isinstance(functions, str), functions
    pointers = shape.data_ptr(), weights.data_ptr(), eps, hidden.data_ptr()
    functions[3](torch.get_num_threads(), *pointers, len(hidden))


@cache
def _library() -> tuple[Callable[..., None], ...] | str:
    """The functions `linear`, `attend`, `decode` and `encode` with PyTorch's threads bound, or why there are none."""
    try:
        return functions(compiled(instructions()))
    except NoKernels as reason:
        return str(reason)


def functions(path: Path) -> tuple[Callable[..., None], ...]:
    """`llava_linear`, `llava_attend`, `llava_decode` and `llava_encode` of a compiled file, computing on PyTorch's threads."""
    try:
        threads = ctypes.CDLL(
            str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
        ).torch_parallel_for
    except (OSError, AttributeError) as error:
        raise NoKernels(
            f"PyTorch {torch.__version__} does not lend its threads; 2.10 and later do"
        ) from error
    library, lent = ctypes.CDLL(str(path)), ctypes.cast(threads, _POINTER)
    found = library.llava_linear, library.llava_attend, library.llava_decode, library.llava_encode
    found[0].argtypes = [_POINTER, _INT, _INT, *[_POINTER] * 5, *[_LONG] * 3]
    found[1].argtypes = [*[_POINTER] * 9, *[_LONG] * 6]
    found[2].argtypes = [
        _POINTER,
        _LONG,
        _POINTER,
        _POINTER,
        ctypes.c_float,
        _POINTER,
        _LONG,
        *[_POINTER] * 3,
        _LONG,
    ]
    found[3].argtypes = [_POINTER, _LONG, _POINTER, _POINTER, ctypes.c_float, _POINTER, _LONG]
    for function in found:
        function.restype = None
    return tuple(partial(function, lent) for function in found)


def instructions() -> tuple[str, ...]:
    """The compiler's flags for the best instructions of this CPU that there is a kernel for."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NoKernels(
            f"they are written for x86-64 on Linux, and this is {platform.machine()} on {sys.platform}"
        )
    if not hasattr(torch.cpu, "get_capabilities"):
        raise NoKernels(
            f"PyTorch {torch.__version__} does not tell what this CPU can do; newer ones do"
        )
    able = torch.cpu.get_capabilities()
    if all(
        able.get(name)
        for name in ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni")
    ):
        return _BFLOAT16 if able.get("avx512_bf16") else _AVX512
    if all(able.get(name) for name in ("avx2", "fma3", "f16c")):
        return _AVX2
    raise NoKernels("this CPU has neither AVX-512 VNNI nor AVX2")


def compiled(flags: tuple[str, ...], folder: Path | None = None) -> Path:
    """The source compiled with these flags, in `folder` or the user's cache; compiled now if it is not there yet."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NoKernels("there is no C++ compiler (c++, g++ or clang++) to compile them with")
    folder = folder or own_folder()
    command = [compiler, "-std=c++17", "-O3", "-fPIC", "-shared", *flags]
    name = hashlib.blake2b(SOURCE.read_bytes() + repr(command).encode(), digest_size=8).hexdigest()
    path = folder / f"kernels-{name}.so"
    if path.is_file():
        return path
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            done = subprocess.run(
                [*command, "-o", str(made), str(SOURCE)], capture_output=True, text=True
            )
            if done.returncode:
                raise NoKernels(
                    f"{compiler} failed: {(done.stderr.strip() or 'no message').splitlines()[0][:200]}"
                )
            return made.replace(path)
    except OSError as error:
        raise NoKernels(f"they cannot be compiled into {folder}: {error.strerror}") from error


def own_folder() -> Path:
    """The user's cache of compiled kernels: a folder that nobody else can write to, for what lies in it is run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-interleave"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError as error:
        raise NoKernels(f"{folder} cannot be made: {error.strerror}") from error
    if sys.platform != "win32" and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        raise NoKernels(
            f"{folder} can be written to by others, and what lies in it is run; chmod go-w and own it"
        )
    return folder
