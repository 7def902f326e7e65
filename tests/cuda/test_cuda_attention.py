"""Attention kernels against products of matrices in float64, keys one after another and in
blocks.
"""

import pytest
import torch
from torch import Tensor

from llava_interleave.model.varlen import KERNELS, VarlenMetadata, unavailable_reason

SEQUENCES = {  # new tokens of each, and all that it has
    "answers": ([1, 1, 1], [1, 300, 513]),
    "prompts": ([40, 300, 7], [40, 300, 7]),
    "both, some in pieces": ([1, 64, 5, 256], [700, 256, 5, 600]),
}
BLOCK = 256


def sure(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, `[T, H, d]` and `[S, Hkv, d]`."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).double() for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k) * q.shape[-1] ** -0.5
    later = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(later, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("blocks", [False, True], ids=["in a row", "in blocks"])
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128)], ids=["alike", "grouped"])
@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels(
    device: str, name: str, sequences: str, heads: tuple[int, int, int], blocks: bool
) -> None:
    place, (new, lengths), (of_queries, of_keys, width) = (
        torch.device(device),
        SEQUENCES[sequences],
        heads,
    )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if reason := unavailable_reason(name, place, dtype, width):
        pytest.skip(f"{name}: {reason}")
    torch.manual_seed(0)
    q = torch.randn(sum(new), of_queries, width, device=place, dtype=dtype)
    k, v = (torch.randn(sum(lengths), of_keys, width, device=place, dtype=dtype) for _ in range(2))
    expected = torch.cat(
        [
            sure(*parts)
            for parts in zip(q.split(new), k.split(lengths), v.split(lengths), strict=True)
        ]
    )
    if not blocks:
        found = KERNELS[name](q, k, v, VarlenMetadata.of(new, lengths, place))
    else:
        table, pools = spread(lengths, k, v)
        found = KERNELS[name](q, *pools, VarlenMetadata.of(new, lengths, place, table))
    assert float((found.double() - expected).abs().max()) < (
        1e-5 if dtype == torch.float32 else 0.03
    )


def spread(lengths: list[int], *kept: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Rows of sequences in blocks of a pool, in no order; a block that no sequence has fills the table
    up.
    """
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts)).split(counts)
    table = torch.full((len(lengths), max(counts)), sum(counts), dtype=torch.int32)
    pools = [rows.new_zeros(sum(counts) + 1, BLOCK, *rows.shape[1:]) for rows in kept]
    for index, own in enumerate(order):
        table[index, : len(own)] = own
        for pool, rows in zip(pools, kept, strict=True):
            filled = pool.new_zeros(len(own) * BLOCK, *rows.shape[1:])
            filled[: lengths[index]] = rows.split(lengths)[index]
            pool[own.to(pool.device)] = filled.unflatten(0, (-1, BLOCK))
    return table.to(kept[0].device), pools
