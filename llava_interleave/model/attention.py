"""The network's one question to its caller: what do these queries see?"""

from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .varlen import KERNELS, VarlenMetadata, choose


class AttentionFn(Protocol):
    """Attention of one layer over a flat batch: q `[T, H, d]`, k and v `[T, Hkv, d]` -> `[T, H, d]`.

    The caller decides which keys a query sees and where keys are kept. Scores are scaled by d ** -0.5.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class PackedAttention:
    """Causal attention within each of several sequences that lie one after another: training and one-off forwards.

    Sequences of similar length go through one call, filled up at the end: what comes after a query it never sees, so no mask is
    needed. A kernel of a GPU that takes unlike lengths takes all in one.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self.total = lengths, sum(lengths)
        self.ragged: VarlenMetadata | None = None
        starts = [0, *accumulate(lengths)]
        groups: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if groups and lengths[index] * 4 >= lengths[groups[-1][0]] * 3:
                groups[-1].append(index)
            else:
                groups.append([index])
        self.groups: list[Tensor] = []  # rows of the flat batch, [sequences, longest]
        back = torch.empty(
            self.total, dtype=torch.long
        )  # where each row is found in the groups' results
        offset = 0
        for group in groups:
            longest = lengths[group[0]]
            for row, index in enumerate(group):
                begin = offset + row * longest
                back[starts[index] : starts[index + 1]] = torch.arange(
                    begin, begin + lengths[index]
                )
            last = torch.tensor([starts[index + 1] - 1 for index in group])[:, None]
            first = torch.tensor([starts[index] for index in group])[:, None]
            self.groups.append(torch.minimum(first + torch.arange(longest), last))
            offset += len(group) * longest
        self.back = back

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape[0] == self.total
        kind = q.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else q.dtype
        if (kernel := choose(q.device, dtype, q.shape[-1])) != "sdpa":
            self.ragged = self.ragged or VarlenMetadata.of(self.lengths, self.lengths, q.device)
            return KERNELS[kernel](q.to(dtype), k.to(dtype), v.to(dtype), self.ragged)
        if q.device != self.back.device:
            self.back, self.groups = (
                self.back.to(q.device),
                [rows.to(q.device) for rows in self.groups],
            )
        parts = [causal(q[rows], k[rows], v[rows]).flatten(0, 1) for rows in self.groups]
        return torch.cat(parts)[self.back]


class AttentionRecorder:
    """`Packed` of one sequence that also keeps what its rows from `first` on attend to in `layers`, computed beside the ordinary
    attention, whose result stays what it is.

    kept: by layer, the mean of the heads' probabilities, `[length - first, length]` float32.
    """

    def __init__(self, length: int, first: int, layers: Collection[int]) -> None:
        assert 0 <= first < length
        self.attend, self.first, self.layers = PackedAttention([length]), first, frozenset(layers)
        self.kept: dict[int, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.layers:
            self.kept[layer] = probabilities(q[self.first :], k)
        return self.attend(layer, q, k, v)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """What `[R, H, d]` queries, the last of T keys `[T, Hkv, d]`, attend to under a causal mask, as the heads' mean `[R, T]`."""
    rows, heads, width = q.shape
    later = torch.ones(rows, len(k), dtype=torch.bool, device=q.device).triu(len(k) - rows + 1)
    mean = torch.zeros(rows, len(k), device=q.device)
    for queries, keys in zip(
        q.float().chunk(k.shape[1], 1), k.float().unbind(1), strict=True
    ):  # a group at a time, for memory
        scores = torch.einsum("rhd,td->hrt", queries, keys) * width**-0.5
        mean += scores.masked_fill(later, -torch.inf).softmax(-1).sum(0)
    return mean / heads


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of `[B, T, H, d]` queries, the last of S keys `[B, S, Hkv, d]` -> `[B, T, H, d]`; T == S or T == 1."""
    assert q.shape[1] in (1, k.shape[1])
    return full(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=q.shape[1] > 1
    ).transpose(1, 2)


def full(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """Attention of `[B, H, T, d]` queries over keys and values `[B, Hkv, S, d]` -> `[B, H, T, d]`."""
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        with torch.autocast(
            "cpu", enabled=False
        ):  # a CPU's attention in bfloat16 takes four times as long backwards
            q, k, v = q.float(), k.float(), v.float()
            return scaled_dot_product_attention(
                q, k, v, is_causal=is_causal, enable_gqa=grouped
            ).to(torch.bfloat16)
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)
