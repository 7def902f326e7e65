"""Losses: pure functions of a network and a batch. They return sums; the loop divides by the step's count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ..model import Llava, Packed, arrange
from .batch import Batch

CHUNK = 2048  # tokens whose logits exist at once


@dataclass(frozen=True, slots=True)
class Loss:
    """Summed loss, what it is summed over, and how many of those were right."""

    total: Tensor
    count: int
    right: int


def answers(model: Llava, batch: Batch) -> Loss:
    """Cross-entropy of the tokens marked `learn`, each predicted from the tokens before it in its sample."""
    features = []
    if batch.media:
        crops = model.encode(batch.pixels).split([layout.crops for _, layout in batch.media])
        features = [(start, arrange(f, layout)) for (start, layout), f in zip(batch.media, crops, strict=True)]
    hidden = model(model.embed(batch.tokens, features), batch.positions.to(batch.tokens.device), Packed(batch.lengths))
    where = batch.learn.nonzero()[:, 0]
    total, right = hidden.new_zeros((), dtype=torch.float32), 0
    for rows in where.split(CHUNK):
        loss, hits = checkpoint(_chunk, model, hidden[rows - 1], batch.tokens[rows], use_reentrant=False)
        total, right = total + loss, right + int(hits)
    return Loss(total, len(where), right)


def _chunk(model: Llava, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = model.logits(hidden).float()
    return cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()
