"""Forward passes over held-out samples and pairs, shared out over the ranks: evaluation, and DPO's
reference log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..distributed.process_group import ProcessGroup
from ..journal import Journal
from ..model import Llava
from .data.packing import Batch, DummyBatch, Pairs, join, pack
from .data.samples import PackedSample, SampleFormat, Samples
from .fsdp import InsideFsdp
from .loop import LossFunction, autocast, device_of
from .losses import logprobs
from .prepare import about
from .recipe import Recipe


@torch.no_grad()
def evaluate(
    network: Llava,
    loss: LossFunction[Llava, Any],
    samples: Samples,
    held_out: Sequence[PackedSample],
    recipe: Recipe,
    ranks: ProcessGroup,
) -> dict[str, float]:
    """Loss and accuracy on held-out samples."""
    sums = []
    for _, batch, dummy in _batches(held_out, samples, recipe, ranks):
        part = loss(network, DummyBatch(batch) if dummy else batch)
        sums.append((part.total.item(), part.count, part.correct))
    total, count, correct = ranks.all_reduce_sum(
        *(sum(column) for column in zip(*sums, strict=True))
    )
    return {"loss": total / max(1, count), "accuracy": correct / max(1, count)}


@torch.no_grad()
def reference_logprobs(
    network: Llava,
    inside: InsideFsdp,
    recipe: Recipe,
    pairs: Sequence[PackedSample],
    model: Path,
    out: Path,
    ranks: ProcessGroup,
    log: Callable[[str], None],
) -> dict[str, tuple[float, float]]:
    """Log-probabilities of all answers under the model before training, by pair.

    They are kept in `reference.jsonl`; only missing ones are computed.
    """
    network.eval()
    with (
        Journal(out / "reference.jsonl", about(out))
        if ranks.rank == 0
        else nullcontext() as journal
    ):
        rows = ranks.run_on_rank0(
            lambda: {name: journal.row(name) for name in journal.done} if journal else {}
        )
        missing = [pair for pair in pairs if pair.name not in rows]
        if missing:
            log(f"computing the reference of {len(missing):,} pairs")
        samples = Samples(missing, model, recipe.seed, SampleFormat(recipe.template, recipe.anyres))
        for group, batch, dummy in _batches(missing, samples, recipe, ranks):
            assert isinstance(batch, Pairs)
            with autocast(device_of(network), recipe.bfloat16):
                values = inside(logprobs, batch).tolist()
            mine = [
                {"id": pair.name, "chosen": chosen, "rejected": rejected}
                for pair, (chosen, rejected) in zip(group, values, strict=True)
            ]
            new = [row for some in ranks.all_gather_object([] if dummy else mine) for row in some]
            rows |= {row["id"]: row for row in new}
            if journal:
                journal.add(new)
    return {pair.name: (rows[pair.name]["chosen"], rows[pair.name]["rejected"]) for pair in pairs}


def _batches(
    packed: Sequence[PackedSample], samples: Samples, recipe: Recipe, ranks: ProcessGroup
) -> Iterator[tuple[list[PackedSample], Batch | Pairs, bool]]:
    """This rank's batches: samples, batch, and whether it is a dummy because too few are left."""
    groups = pack(
        [sample.tokens for sample in packed],
        recipe.tokens,
        [sample.images for sample in packed],
        recipe.images,
    )
    for first in range(0, len(groups), ranks.world_size):
        dummy = first + ranks.rank >= len(groups)
        group = [packed[i] for i in groups[first if dummy else first + ranks.rank]]
        yield group, join([samples.make(sample) for sample in group]), dummy
