"""Compile the kernels: one shared library for each instruction set of this machine's architecture.

    python llava_interleave/kernels/compilation.py [FOLDER]

Installation runs it (`hatch_build.py`). It needs nothing but Python and a C++ compiler ($CXX, or
c++, g++ or clang++), because the sources include nothing of Python or PyTorch. A library's name
ends in a hash of sources and flags: what is compiled already is left as it is."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
FOLDER = Path(__file__).with_name("lib")
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
        "avx512_bf16": _AVX512_BF16,
        "avx512_vnni": _AVX512,
        "avx_vnni": (*_AVX2, "-mavxvnni"),
        "avx2": _AVX2,
    },
    "aarch64": {
        "neon_i8mm": ("-march=armv8.2-a+dotprod+i8mm",),
        "neon_dotprod": ("-march=armv8.2-a+dotprod",),
    },
}
"""Architecture -> instruction set, best first -> the compiler's flags."""


class CompileError(Exception):
    """Why the kernels could not be compiled."""


def architecture() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def flags() -> dict[str, tuple[str, ...]]:
    """`FLAGS` of this machine's architecture; empty where there are no kernels for it."""
    return FLAGS.get(architecture(), {})


def find_compiler() -> list[str]:
    """The command of the C++ compiler."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    # GCC does not align stacks for AVX on Windows (GCC bug 54412)
    names = ("clang++",) if sys.platform == "win32" else ("c++", "g++", "clang++")
    if found := next(filter(None, map(shutil.which, names)), None):
        return [found]
    raise CompileError(f"there is no C++ compiler ({' or '.join(names)})")


def options(instructions: str) -> list[str]:
    """Arguments of the compiler for one instruction set."""
    of_platform = {"darwin": ("-fPIC",), "win32": ()}.get(sys.platform, ("-fPIC", "-pthread", "-s"))
    # compilers differ in what they contract to a fused multiply-add: the code says where
    common = ("-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fvisibility=hidden")
    return [*common, *of_platform, *flags()[instructions]]


def library_path(instructions: str, folder: Path = FOLDER) -> Path:
    """Where the library of an instruction set is, or will be, for the present sources."""
    state = hashlib.blake2b(repr(options(instructions)).encode(), digest_size=8)
    for source in sorted(SOURCES.glob("*.[ch]*")):
        state.update(source.read_bytes())
    return folder / f"{instructions}-{state.hexdigest()}{SUFFIX}"


def compile_library(instructions: str, folder: Path = FOLDER) -> Path:
    """One library, compiled unless it is there. Raises CompileError."""
    path = library_path(instructions, folder)
    if path.is_file():
        return path
    scratch = path.with_name(f"{os.getpid()}-{path.name}")
    command = [*find_compiler(), *options(instructions), "-o", str(scratch)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            [*command, str(SOURCES / "layers.cpp")], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise CompileError(f"{command[0]} into {folder}: {error.strerror}") from error
    if result.returncode:
        scratch.unlink(missing_ok=True)
        message = (result.stderr.strip() or "no message").splitlines()[0][:200]
        raise CompileError(f"{command[0]} failed for {instructions}: {message}")
    return scratch.replace(path)


def compile_all(folder: Path = FOLDER) -> Iterator[Path]:
    """All libraries, on all cores; those of other sources are deleted. Raises CompileError."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda name: compile_library(name, folder), flags()))
    for path in folder.glob(f"*{SUFFIX}"):
        if path not in found:
            path.unlink()
    yield from found


if __name__ == "__main__":
    try:
        for made in compile_all(*map(Path, sys.argv[1:])):
            print(made)
    except CompileError as error:
        sys.exit(str(error))
