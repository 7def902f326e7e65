"""Attention is the caller's: the function that the network calls in each layer, and implementations
of it."""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from .. import kernels


class AttentionFn(Protocol):
    """Attention of one layer over a flat batch: q `[T, H, d]`, k and v `[T, Hkv, d]` -> `[T, H,
    d]`.

    The caller decides which keys a query sees, and owns the KV cache. Scores are scaled by d **
    -0.5.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class PackedAttention:
    """Causal attention within each of several packed sequences: training and one-off forwards.

    Sequences of similar length share a call, padded at the end: the causal mask hides the padding.
    On a CPU that trains, a kernel reads them where they are.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.groups: list[list[int]] = []  # sequences of a call, the longest first
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if self.groups and lengths[index] * 4 >= lengths[self.groups[-1][0]] * 3:
                self.groups[-1].append(index)
            else:
                self.groups.append([index])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kernels.training.applies(q, k, v):
            return kernels.training.packed_attention(q, k, v, self.lengths)
        sequences = [x.split(self.lengths) for x in (q, k, v)]
        attended: dict[int, Tensor] = {}
        for group in self.groups:
            rows = (
                pad_sequence([parts[index] for index in group], batch_first=True)
                if len(group) > 1
                else parts[group[0]][None]
                for parts in sequences
            )
            for index, found in zip(group, causal(*rows), strict=True):
                attended[index] = found[: self.lengths[index]]
        return torch.cat([attended[index] for index in range(len(self.lengths))])


StoredKV = Callable[[int], tuple[Tensor, Tensor]]
"""Keys and values of computed tokens by layer, `[S, Hkv, d]` each."""


class ContinuationAttention:
    """Several continuations of one sequence, each of which may see a part of it only: attribution.

    lengths: rows of each in the flat batch, which are causal. seen: by continuation, the ranges of
    stored tokens that all its rows see, ascending. stored: the sequence's KV cache; without
    them there is one continuation, the whole sequence.
    recorded: by layer of `layers`, attention probabilities of the first continuation's last
    `record` rows, if it sees all: mean over heads, `[record, S + R]` float32. They are computed
    separately; the result of the attention is unchanged.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seen: Sequence[Sequence[tuple[int, int]]],
        stored: StoredKV | None,
        *,
        layers: Collection[int] = (),
        record: int = 0,
    ) -> None:
        self.lengths, self.seen, self.stored = list(lengths), seen, stored
        self.layers, self.record = frozenset(layers), record
        self.recorded: dict[int, Tensor] = {}
        self.visible: tuple[Tensor, Tensor] | None = None
        if stored is None:
            self.whole = PackedAttention(self.lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.stored is None:
            self._record(layer, q, k)
            return self.whole(layer, q, k, v)
        sources = self.stored(layer)
        keys, values = self._buffers(q, k)
        placed: list[tuple[int, int, int]] = []
        outputs = []
        parts = zip(self.seen, *(x.split(self.lengths) for x in (q, k, v)), strict=True)
        for index, (ranges, queries, own_keys, own_values) in enumerate(parts):
            # what it sees lies in a row before its own rows; most of it is there already
            ends = [0, *accumulate(stop - start for start, stop in ranges)]
            wanted = [(*one, one[0] - end) for one, end in zip(ranges, ends[:-1], strict=True)]
            for start, stop, shift in _missing(wanted, placed):
                keys[start - shift : stop - shift] = sources[0][start:stop]
                values[start - shift : stop - shift] = sources[1][start:stop]
            placed, at, end = wanted, ends[-1], ends[-1] + len(queries)
            if _has_kernel(q):
                out = kernels.attend(
                    queries, own_keys, own_values, keys.permute(1, 2, 0), values.transpose(0, 1), at
                )
            else:
                keys[at:end], values[at:end] = own_keys, own_values
                out = _continued(queries, keys[:end], values[:end])
            if index == 0:
                keys[at:end] = own_keys
                self._record(layer, queries, keys[:end])
            outputs.append(out)
        return torch.cat(outputs)

    def _buffers(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[capacity, Hkv, d]` that one continuation sees, in the order of memory
        that its attention reads them in."""
        if self.visible is None:
            capacity = max(
                sum(stop - start for start, stop in ranges) + rows
                for ranges, rows in zip(self.seen, self.lengths, strict=True)
            )
            _, heads, d = k.shape
            values = k.new_empty(heads, capacity, d).transpose(0, 1)
            keys = (
                k.new_empty(heads, d, capacity).permute(2, 0, 1)
                if _has_kernel(q)
                else torch.empty_like(values)
            )
            self.visible = keys, values
        return self.visible

    def _record(self, layer: int, q: Tensor, k: Tensor) -> None:
        if layer in self.layers:
            self.recorded[layer] = probabilities(q[len(q) - self.record :], k)


def _missing(
    wanted: Sequence[tuple[int, int, int]], placed: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[int, int, int]]:
    """The parts of ranges (start, stop, shift) that are not in `placed` with the same shift; both
    ascend."""
    for start, stop, shift in wanted:
        for begin, end, moved in placed:
            if moved == shift and begin < stop and end > start:
                if begin > start:
                    yield start, begin, shift
                start = end
        if start < stop:
            yield start, stop, shift


def _has_kernel(q: Tensor) -> bool:
    return (
        q.is_cpu
        and q.dtype == torch.bfloat16
        and q.shape[-1] % kernels.PANEL == 0
        and kernels.unavailable_reason() is None
    )


def _continued(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `[R, H, d]` queries, the last R of S tokens, over `[S, Hkv, d]` -> `[R, H,
    d]`."""
    mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention probabilities of `[R, H, d]` queries, the last R of T tokens, over keys `[T,
    Hkv, d]`: mean over heads `[R, T]`."""
    rows, heads, width = q.shape
    later = torch.ones(rows, len(k), dtype=torch.bool, device=q.device).triu(len(k) - rows + 1)
    mean = torch.zeros(rows, len(k), device=q.device)
    for queries, keys in zip(
        q.float().chunk(k.shape[1], 1), k.float().unbind(1), strict=True
    ):  # one KV head at a time, to save memory
        scores = torch.einsum("rhd,td->hrt", queries, keys) * width**-0.5
        mean += scores.masked_fill(later, -torch.inf).softmax(-1).sum(0)
    return mean / heads


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of `[B, T, H, d]` queries, the last of S keys `[B, S, Hkv, d]` -> `[B, T, H,
    d]`; T == S or T == 1."""
    assert q.shape[1] in (1, k.shape[1])
    return full(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=q.shape[1] > 1
    ).transpose(1, 2)


def full(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """Attention of `[B, H, T, d]` queries over keys and values `[B, Hkv, S, d]` -> `[B, H, T,
    d]`."""
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # the backward of a CPU's attention takes four times as long in bfloat16
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            return scaled_dot_product_attention(
                q, k, v, is_causal=is_causal, enable_gqa=grouped
            ).to(torch.bfloat16)
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)
