"""Programmatic dependent launch (compute capability 9.0; CUDA C++ programming guide): a kernel
starts while the one before it still runs, and waits for it before the first memory that it may
share.

Every kernel calls both functions, `wait` in all its programs: a kernel that has ended then implies
that all before it have."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def launch_next(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the kernel before, and for its memory."""
    if PDL:
        gdc_wait()
