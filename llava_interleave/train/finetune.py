"""Supervised fine-tuning of a checkpoint on samples of any form that `sources` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import weights
from ..errors import DataError, LlavaError, OptionError
from ..model import Llava
from ..prompt import Prompt
from . import data, sources
from .batch import Windows, batches, collate, pack
from .check import Checked, check
from .loop import TrainConfig, train
from .loss import answers
from .sources import Row

TOLD = 5
"""How many faulty samples a refusal names."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Example i: sample number i, counted on through as many passes as are wanted, each in an order of its own."""

    rows: Sequence[Row]
    model: Path
    seed: int

    def __call__(self, index: int) -> Prompt:
        epoch, number = divmod(index, len(self.rows))
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + epoch))
        row = self.rows[int(order[number])]
        said, media = row.messages()
        try:
            return data.processor(self.model).example(said, media)
        except LlavaError as error:
            raise DataError(f"sample {row.name}: {error}") from error


def finetune(
    model: str | Path,
    source: Path,
    out: Path,
    config: TrainConfig,
    *,
    media: Path | None = None,
    question: str | None = None,
    held_out: float | None = None,
    skip_errors: bool = False,
    tokens: int = 8192,
    seed: int = 0,
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> Path:
    """Train `model` on the answers in `source`; relative paths begin at `media`, or beside it. -> the new checkpoint's folder.

    All samples are read first. Without `skip_errors` one that has an error ends it; with it those are listed and left out.
    question: what is asked about the pictures of a folder. held_out: the share of a folder that is not trained on, a tenth
    without it; the loss there is told before and after, and `held-out.jsonl` in `out` is for `llava batch`.
    Log and checkpoints lie in `out`; called again it goes on where it stopped. tokens: of a batch, at least the longest
    sample's. Raises CheckpointError, DataError, OptionError.
    """
    if held_out is not None and not source.is_dir():
        raise OptionError(f"{source} is a file: a share is held out of folders only; split the file and leave out --held-out")
    folder = weights.resolve(model)
    found = sources.rows(source, media=media, question=question, seed=seed)
    sound = _sound(found, folder, source, tokens, skip_errors, say)
    rows = [one.row for one in sound]
    kept: list[Row] = []
    if source.is_dir():
        rows, kept = sources.split(rows, 0.1 if held_out is None else held_out, seed)
        say(f"{len(rows):,} samples to train on, {len(kept):,} held out")
    if not rows:
        raise DataError(f"nothing of {source} is left to train on: hold out less")
    _same_as_before(rows, out)
    lengths = {one.row.name: one.tokens or 0 for one in sound}
    groups = [[kept[i] for i in group] for group in pack([lengths[row.name] for row in kept], tokens)]
    if kept:
        (out / "held-out.jsonl").write_text("".join(json.dumps(_question(row)) + "\n" for row in kept), "utf-8")
    network = weights.load(folder)
    stored = network.lm_head.weight.dtype
    network = network.float().requires_grad_(True)
    windows = Windows(Samples(rows, folder, seed), 2**40, size=min(128, len(rows)), tokens=tokens, seed=seed)
    before = _measure(network, groups, folder)
    train(network, answers, lambda at: batches(windows, at, workers=workers), config, out, say=say)
    if kept:
        say(f"held out, before: {before}\nheld out, after:  {_measure(network, groups, folder)}")
    done = out / "model"
    if not done.exists():
        weights.save(network, done, processor_from=folder, dtype=stored)
    return done


def _sound(
    rows: list[Row], model: Path, source: Path, tokens: int, skip_errors: bool, say: Callable[[str], None]
) -> list[Checked]:
    """The samples without errors; those left out are listed. Raises DataError where nothing may be left out, or all would be."""
    say(f"reading {len(rows):,} samples of {source}")
    checked = check(rows, data.processor(model), tokens)
    faults = [next(fault.text for fault in one.faults if fault.error) for one in checked if one.error]
    if faults and not skip_errors:
        more = f"; and {len(faults) - TOLD:,} more" if len(faults) > TOLD else ""
        raise DataError(
            f"{len(faults):,} of {len(rows):,} samples have errors: {'; '.join(faults[:TOLD])}{more}. `llava data check` lists "
            "all; with --skip-errors they are left out"
        )
    for fault in faults:
        say(f"left out: {fault}")
    if len(faults) == len(rows):
        raise DataError(f"all {len(rows):,} samples of {source} have errors: nothing is left to train on")
    if faults:
        say(f"{len(faults):,} of {len(rows):,} samples were left out")
    if twins := sum(fault.kind == "duplicate" for one in checked for fault in one.faults):
        say(f"{twins:,} samples say and show the same as another one; `llava data check` lists them")
    return [one for one in checked if not one.error]


def _question(row: Row) -> dict[str, object]:
    """A folder's sample as `llava batch` asks it, with its true answer beside."""
    asked, answer = (turn["value"] for turn in row.sample["conversations"])
    images = [str((row.root / name).absolute()) for name in row.sample["image"]]
    return {"id": row.name, "question": asked, "images": images, "truth": answer}


@torch.no_grad()
def _measure(network: Llava, groups: Sequence[Sequence[Row]], model: Path) -> str:
    """Loss on the answers of samples that come in batches."""
    parts = [answers(network, collate([data.processor(model).example(*row.messages()) for row in group])) for group in groups]
    count = max(1, sum(part.count for part in parts))
    loss, right = sum(part.total.item() for part in parts) / count, sum(part.right for part in parts) / count
    return f"loss {loss:.4f}, {right:.1%} of tokens right"


def _same_as_before(rows: Sequence[Row], out: Path) -> None:
    """A run goes on only with the samples that it began with: others would come in another order, some twice, some never."""
    state = hashlib.blake2b(digest_size=16)
    for row in rows:
        state.update(json.dumps([row.name, row.sample], default=repr).encode("utf-8", "backslashreplace"))
    now = {"samples": len(rows), "digest": state.hexdigest()}
    path = out / "data.json"
    if path.exists() and any((out / name).exists() for name in ("checkpoint", "checkpoint.old")):
        before = json.loads(path.read_text("utf-8"))
        if before != now:
            raise DataError(
                f"{out} is of a run with other data ({before['samples']:,} samples there, {now['samples']:,} here, or as many "
                "others); take another folder, or delete it"
            )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now) + "\n", "utf-8")
