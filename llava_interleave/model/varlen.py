"""Attention of sequences of unlike length that lie one after another: by a GPU's kernels in one call, or a sequence at a time.

PyTorch's kernel is told not to split the keys of a sequence. It then computes a token alike in any company; and split, with keys
in blocks, it leaves out all sequences but the first (pytorch issue 194167).
"""

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
    """Where sequences lie. The new tokens of each are the last of those that it has, and see all up to themselves.

    new, seen: where the queries and the keys of each begin, and where the last ends, `[N + 1]`; lengths: of its keys, `[N]`; all
    int32. most_new, most_seen: bounds of the queries and the keys of one. table: in a pool of blocks `[blocks, tokens, Hkv, d]`
    the numbers of those where the keys of each lie, `[N, most]` int32; None: keys lie one after another, `[T, Hkv, d]`.
    """

    new: Tensor
    seen: Tensor
    lengths: Tensor
    most_new: int
    most_seen: int
    table: Tensor | None = None

    @classmethod
    def of(
        cls,
        new: Sequence[int],
        lengths: Sequence[int],
        device: torch.device,
        table: Tensor | None = None,
    ) -> VarlenMetadata:
        """Of sequences that have so many tokens, of which so many are new."""
        rows = ([0, *accumulate(new)], [0, *accumulate(lengths)], lengths)
        starts, ends, own = (torch.tensor(row, dtype=torch.int32, device=device) for row in rows)
        return cls(starts, ends, own, max(new), max(lengths), table)

    @cached_property
    def spans(self) -> list[tuple[slice, slice]]:
        """The rows of each one's queries and of its keys, where these lie one after another."""
        new, seen = (
            [slice(a, b) for a, b in pairwise(starts.tolist())] for starts in (self.new, self.seen)
        )
        return list(zip(new, seen, strict=True))

    def read(self, number: int, kept: Tensor) -> Tensor:
        """Keys or values `[S, Hkv, d]` of one sequence."""
        rows = self.spans[number][1]
        if self.table is None:
            return kept[rows]
        length, size = rows.stop - rows.start, kept.shape[1]
        return kept[self.table[number, : -(-length // size)].long()].flatten(0, 1)[:length]


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenMetadata], Tensor]
"""Queries `[T, H, d]`, keys and values as `Ragged` says -> `[T, H, d]`."""


def varlen(q: Tensor, k: Tensor, v: Tensor, of: VarlenMetadata) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    found = varlen_attn(
        q,
        k,
        v,
        of.new,
        of.seen,
        of.most_new,
        of.most_seen,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[-2],
        seqused_k=None if of.table is None else of.lengths,
        block_table=of.table,
        num_splits=None if q.requires_grad else 1,
    )
    assert isinstance(found, Tensor)
    return found


def flash(q: Tensor, k: Tensor, v: Tensor, of: VarlenMetadata) -> Tensor:
    attention: Callable[..., Tensor] = import_module("flash_attn").flash_attn_varlen_func
    return attention(
        q, k, v, of.new, of.seen, of.most_new, of.most_seen, causal=True, block_table=of.table
    )


def each(q: Tensor, k: Tensor, v: Tensor, of: VarlenMetadata) -> Tensor:
    """The truth that kernels are held to."""
    found = []
    for number, (rows, _) in enumerate(of.spans):
        queries, keys, values = (
            x.transpose(0, 1)[None] for x in (q[rows], of.read(number, k), of.read(number, v))
        )
        new, seen, grouped = queries.shape[2], keys.shape[2], queries.shape[1] != keys.shape[1]
        mask = (
            None
            if new in (1, seen)
            else torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
        )
        out = scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=new == seen > 1, enable_gqa=grouped
        )
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


KERNELS: dict[str, Kernel] = {"varlen_attn": varlen, "flash-attn": flash, "sdpa": each}
"""By name, the fastest first."""


def unavailable_reasons(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> dict[str, str | None]:
    """Of each of the kernels, why it cannot be used; None where it can, as the last always can."""
    here = _hardware(device, dtype, head_dim)
    return {"varlen_attn": here or _no_varlen(), "flash-attn": here or _no_flash(), "sdpa": None}


@cache
def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The first of the kernels that can be used."""
    return next(
        name
        for name, reason in unavailable_reasons(device, dtype, head_dim).items()
        if reason is None
    )


def _hardware(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return "there is no CUDA here"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"it takes heads of a multiple of 8 up to 256, not of {head_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"it needs a GPU of compute capability 8.0, this one has {major}.{minor}"
        if major < 8
        else None
    )


def _no_varlen() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"PyTorch {torch.__version__} does not have it"
    if not {"block_table", "num_splits"} <= inspect.signature(varlen_attn).parameters.keys():
        return f"that of PyTorch {torch.__version__} reads no blocks"
    return (
        None
        if torch.backends.cuda.is_flash_attention_available()
        else "PyTorch was built without flash attention"
    )


def _no_flash() -> str | None:
    try:
        import_module("flash_attn")
    except ImportError as error:
        return f"the package flash-attn is not to be had ({error})"
    return None
