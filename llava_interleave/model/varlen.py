"""Attention over packed sequences of different lengths: by a GPU kernel in one call, or one
sequence at a time.

PyTorch's kernel is called with `num_splits=1`: it does not split the keys of a sequence, and so is
batch-invariant. With splits and a block table it would also drop all sequences but the first
(pytorch issue 194167)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class VarlenMetadata:
    """Where each sequence lies in a flat batch. Its queries are its last tokens, and see all tokens
    up to themselves.

    cu_seqlens_q, cu_seqlens_k: cumulative numbers of queries and keys, `[N + 1]`; seqlens_k: keys
    of each, `[N]`; all int32. max_seqlen_q, max_seqlen_k: upper bounds for one sequence.
    block_table: numbers of each sequence's blocks in a pool `[blocks, tokens, Hkv, d]`, `[N,
    max_blocks]` int32; None: keys are contiguous, `[T, Hkv, d]`.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_table: Tensor | None = None

    @classmethod
    def of(
        cls,
        queries: Sequence[int],
        lengths: Sequence[int],
        device: torch.device,
        block_table: Tensor | None = None,
    ) -> VarlenMetadata:
        """From the number of queries and of all tokens of each sequence."""
        rows = ([0, *accumulate(queries)], [0, *accumulate(lengths)], lengths)
        q, k, own = (torch.tensor(row, dtype=torch.int32, device=device) for row in rows)
        return cls(q, k, own, max(queries), max(lengths), block_table)

    @cached_property
    def spans(self) -> list[tuple[slice, slice]]:
        """The rows of each sequence's queries, and of its keys where these are contiguous."""
        queries, keys = (
            [slice(a, b) for a, b in pairwise(starts.tolist())]
            for starts in (self.cu_seqlens_q, self.cu_seqlens_k)
        )
        return list(zip(queries, keys, strict=True))

    def gather(self, number: int, x: Tensor) -> Tensor:
        """Keys or values `[S, Hkv, d]` of one sequence."""
        rows = self.spans[number][1]
        if self.block_table is None:
            return x[rows]
        length, size = rows.stop - rows.start, x.shape[1]
        return x[self.block_table[number, : -(-length // size)].long()].flatten(0, 1)[:length]


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenMetadata], Tensor]
"""q `[T, H, d]`, k and v as `VarlenMetadata` says -> `[T, H, d]`."""


def varlen_attn(q: Tensor, k: Tensor, v: Tensor, meta: VarlenMetadata) -> Tensor:
    """PyTorch's kernel."""
    from torch.nn.attention import varlen

    out = varlen.varlen_attn(
        q,
        k,
        v,
        meta.cu_seqlens_q,
        meta.cu_seqlens_k,
        meta.max_seqlen_q,
        meta.max_seqlen_k,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[-2],
        seqused_k=None if meta.block_table is None else meta.seqlens_k,
        block_table=meta.block_table,
        num_splits=None if q.requires_grad else 1,
    )
    assert isinstance(out, Tensor)
    return out


def flash_attn(q: Tensor, k: Tensor, v: Tensor, meta: VarlenMetadata) -> Tensor:
    """The kernel of the package flash-attn."""
    attention: Callable[..., Tensor] = import_module("flash_attn").flash_attn_varlen_func
    return attention(
        q,
        k,
        v,
        meta.cu_seqlens_q,
        meta.cu_seqlens_k,
        meta.max_seqlen_q,
        meta.max_seqlen_k,
        causal=True,
        block_table=meta.block_table,
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, meta: VarlenMetadata) -> Tensor:
    """One call per sequence: the reference for the kernels."""
    outputs = []
    for number, (rows, _) in enumerate(meta.spans):
        queries, keys, values = (
            x.transpose(0, 1)[None]
            for x in (q[rows], meta.gather(number, k), meta.gather(number, v))
        )
        new, length, grouped = queries.shape[2], keys.shape[2], queries.shape[1] != keys.shape[1]
        mask = (
            None
            if new in (1, length)
            else torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
        )
        out = scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=new == length > 1, enable_gqa=grouped
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


KERNELS: dict[str, Kernel] = {"varlen_attn": varlen_attn, "flash-attn": flash_attn, "sdpa": sdpa}
"""By name, the fastest first; the last is always available."""


def unavailable_reason(
    kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why a kernel cannot be used; None where it can."""
    if kernel == "sdpa":
        return None
    no_package = _no_varlen_attn if kernel == "varlen_attn" else _no_flash_attn
    return _unsupported(device, dtype, head_dim) or no_package()


@cache
def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The fastest kernel that can be used."""
    names = (k for k in KERNELS if unavailable_reason(k, device, dtype, head_dim) is None)
    return next(names)


def _unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return "it needs CUDA"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"it takes a head_dim that is a multiple of 8 up to 256, not {head_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs a GPU of compute capability 8.0, this one has {major}.{minor}"
    return None


def _no_varlen_attn() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"PyTorch {torch.__version__} does not have it"
    if not {"block_table", "num_splits"} <= inspect.signature(varlen_attn).parameters.keys():
        return f"in PyTorch {torch.__version__} it takes no block table"
    if torch.backends.cuda.is_flash_attention_available():
        return None
    return "PyTorch was built without flash attention"


def _no_flash_attn() -> str | None:
    try:
        import_module("flash_attn")
    except ImportError as error:
        return f"the package flash-attn cannot be imported ({error})"
    return None
