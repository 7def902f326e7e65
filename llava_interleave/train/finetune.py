"""Supervised fine-tuning of a checkpoint on samples in the M4-Instruct / LLaVA JSON form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import weights
from ..errors import DataError, LlavaError
from ..prompt import Prompt
from . import data
from .batch import Windows, batches
from .loop import TrainConfig, train
from .loss import answers


@dataclass(frozen=True, slots=True)
class Samples:
    """Example i: sample number i of the file, counted on through as many passes as are wanted, each in an order of its own."""

    samples: Sequence[dict[str, Any]]
    root: Path
    model: Path
    seed: int

    def __call__(self, index: int) -> Prompt:
        epoch, number = divmod(index, len(self.samples))
        order = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(self.seed + epoch))
        sample = self.samples[int(order[number])]
        said, media = data.messages(sample, self.root)
        try:
            return data.processor(self.model).example(said, media)
        except LlavaError as error:
            raise DataError(f"sample {sample.get('id', sample.get('sample_id', 'without id'))}: {error}") from error


def finetune(
    model: str | Path,
    annotations: Path,
    out: Path,
    config: TrainConfig,
    *,
    tokens: int = 8192,
    seed: int = 0,
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> Path:
    """Train `model` on the answers in `annotations`; media paths are relative to that file. -> the new checkpoint's folder.

    Log and checkpoints lie in `out`; called again it goes on where it stopped. tokens: of a batch, at least the longest
    sample's. Raises CheckpointError, DataError.
    """
    folder = weights.resolve(model)
    samples = data.read(annotations)
    for sample in samples:
        data.messages(sample, annotations.parent)
    network = weights.load(folder)
    stored = network.lm_head.weight.dtype
    network = network.float().requires_grad_(True)
    windows = Windows(
        Samples(samples, annotations.parent, folder, seed), 2**40, size=min(128, len(samples)), tokens=tokens, seed=seed
    )
    train(network, answers, lambda at: batches(windows, at, workers=workers), config, out, say=say)
    done = out / "model"
    if not done.exists():
        weights.save(network, done, processor_from=folder, dtype=stored)
    return done
