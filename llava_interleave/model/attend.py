"""The network's one question to its caller: what do these queries see?"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Attend(Protocol):
    """Attention of one layer over a flat batch: q `[T, H, d]`, k and v `[T, Hkv, d]` -> `[T, H, d]`.

    The caller decides which keys a query sees and where keys are kept. Scores are scaled by d ** -0.5.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Packed:
    """Causal attention within each of several sequences that lie one after another: training and one-off forwards."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape[0] == sum(self.lengths)
        parts = zip(q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
        return torch.cat([causal(*part) for part in parts])


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of `[T, H, d]` queries, the last of S keys `[S, Hkv, d]`, -> `[T, H, d]`; T == S or T == 1."""
    assert q.shape[0] in (1, k.shape[0])
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)
