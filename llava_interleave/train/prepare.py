"""The start of a run: read and check the samples, begin the run's folder, load the network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import checkpoints
from ..errors import DataError, OptionError, Unsupported
from ..lora import LoraAdapter, attach
from ..model import Llava
from ..quantization import linear_cuda
from ..quantization.precision import CUDA_ONLY
from . import checkpointing
from .data import datasets, formats
from .data.datasets import RawSample
from .data.samples import PackedSample, SampleFormat
from .data.validate import ValidatedSample, validate
from .recipe import Recipe, changed_settings, read

MAX_LISTED = 5
"""How many faulty samples an error lists."""
DATA = "samples.json"


def prepare_samples(
    recipe: Recipe, model: Path, form: SampleFormat, out: Path, log: Callable[[str], None]
) -> tuple[list[PackedSample], list[PackedSample]]:
    """Read and check all samples, and begin the run's folder. -> training and held-out samples.

    Raises DataError, OptionError.
    """
    assert recipe.source is not None
    rows = datasets.rows(
        recipe.source, media=recipe.media, question=recipe.question, seed=recipe.seed
    )
    samples = _without_errors(rows, model, recipe, form, log)
    ratio = (0.1 if recipe.source.is_dir() else 0.0) if recipe.held_out is None else recipe.held_out
    _, rows_out = datasets.split([sample.rows[0] for sample in samples], ratio, recipe.seed)
    names = {row.name for row in rows_out}
    held_out = [sample for sample in samples if sample.rows[0].name in names]
    training = [sample for sample in samples if sample.rows[0].name not in names]
    log(f"{len(training):,} samples to train on, {len(held_out):,} held out")
    if not training:
        raise DataError(f"nothing of {recipe.source} is left to train on: hold out less")
    if recipe.evaluate_every and not held_out:
        raise OptionError(
            "evaluate_every is for held-out samples, and there are none: give held_out, "
            "or leave it out"
        )
    _check_resumed_run(recipe, [*training, *held_out], out)
    (out / "config.toml").write_text(recipe.toml(), "utf-8")
    if held_out and recipe.source.is_dir():
        lines = [json.dumps(_question(sample.rows[0])) + "\n" for sample in held_out]
        (out / "held-out.jsonl").write_text("".join(lines), "utf-8")
    return training, held_out


def _without_errors(
    rows: list[RawSample],
    model: Path,
    recipe: Recipe,
    form: SampleFormat,
    log: Callable[[str], None],
) -> list[PackedSample]:
    """The samples, or pairs, without errors; those left out are listed.

    Raises DataError where a sample has an error and none may be left out, or where all have errors.
    """
    if wrong := next((row for row in rows if bool(row.pair) != bool(recipe.dpo)), None):
        raise DataError(
            f"sample {wrong.pair} has a chosen and a rejected answer, and pairs are for dpo: "
            "take the recipe dpo"
            if wrong.pair
            else f"sample {wrong.name} is not a pair of a chosen and a rejected answer, "
            "and dpo learns from pairs only"
        )
    log(f"reading {len(rows):,} samples of {recipe.source}")
    checked = validate(rows, formats.processor(model), recipe.tokens, form=form)
    sides = 2 if recipe.dpo else 1
    groups = list(zip(*(checked[side::sides] for side in range(sides)), strict=True))
    errors = [error for group in groups if (error := _first_error(group, recipe))]
    if errors and not recipe.skip_errors:
        count = len(errors) - MAX_LISTED
        more = f"; and {count:,} more" if count > 0 else ""
        raise DataError(
            f"{len(errors):,} of {len(groups):,} samples have errors: "
            f"{'; '.join(errors[:MAX_LISTED])}{more}. `llava data check` lists all; "
            "with --skip-errors they are left out"
        )
    for text in errors:
        log(f"left out: {text}")
    if len(errors) == len(groups):
        raise DataError(
            f"all {len(groups):,} samples of {recipe.source} have errors: "
            "nothing is left to train on"
        )
    if errors:
        log(f"{len(errors):,} of {len(groups):,} samples were left out")
    if duplicates := sum(
        fault.kind == "duplicate" and not fault.error for one in checked for fault in one.faults
    ):
        log(
            f"{duplicates:,} samples have the same text and media as another one; "
            "`llava data check` lists them"
        )
    return [
        PackedSample(
            tuple(one.row for one in group),
            sum(one.tokens or 0 for one in group),
            sum(one.images_first_tokens or 0 for one in group),
            group[0].images or 0,
        )
        for group in groups
        if not _first_error(group, recipe)
    ]


def _first_error(group: Sequence[ValidatedSample], recipe: Recipe) -> str | None:
    """The first error of a sample, or of a pair."""
    for side in group:
        for fault in side.faults:
            if fault.error:
                return fault.text
    pair, tokens = group[0].row.pair, sum(side.tokens or 0 for side in group)
    images = group[0].images or 0
    if pair and tokens > recipe.tokens:
        return (
            f"pair {pair} has {tokens:,} tokens, more than the {recipe.tokens:,} of a batch: "
            "raise --tokens, or shorten it"
        )
    if 0 < recipe.images < images:
        return (
            f"sample {pair or group[0].row.name} has {images:,} images and frames, more than the "
            f"{recipe.images:,} of a batch: raise --images, or show less in it"
        )
    return None


def _question(row: RawSample) -> dict[str, object]:
    """A folder's sample as a row for `llava batch`, with its answer as `truth`."""
    question, answer = (turn["value"] for turn in row.sample["conversations"])
    images = [str((row.root / name).absolute()) for name in row.sample["image"]]
    return {"id": row.name, "question": question, "images": images, "truth": answer}


def digest(samples: Sequence[PackedSample]) -> str:
    """A hash of what samples say, 32 hex digits."""
    state = hashlib.blake2b(digest_size=16)
    for sample in samples:
        for row in sample.rows:
            text = json.dumps([row.name, row.sample], default=repr)
            state.update(text.encode("utf-8", "backslashreplace"))
    return state.hexdigest()


def _check_resumed_run(recipe: Recipe, samples: Sequence[PackedSample], out: Path) -> None:
    """Raises DataError where `out` has a run with other settings, or with other samples."""
    now = {"samples": len(samples), "digest": digest(samples)}
    path, config = out / DATA, out / "config.toml"
    if path.exists() and checkpointing.list_checkpoints(out):
        before = json.loads(path.read_text("utf-8"))
        if before != now:
            raise DataError(
                f"{out} has a run on other data ({before['samples']:,} samples there, "
                f"{now['samples']:,} here, or as many others); take another folder, or delete it"
            )
        stored = read(config).stored() if config.exists() else recipe.stored()
        if changed := changed_settings(stored, recipe):
            raise DataError(
                f"{out} has a run with other settings ({changed}); take another folder, "
                "or delete it"
            )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now) + "\n", "utf-8")


def check_precision(recipe: Recipe, model: Path, device: torch.device) -> None:
    """Raises Unsupported or OptionError where quantized weights cannot be trained on or with."""
    stored = checkpoints.Checkpoint.open(model).precision
    if stored and not recipe.adapter:
        raise Unsupported(
            f"{model} has {stored} weights, which cannot be trained: train an adapter "
            "(--adapter-rank), or the checkpoint it was made from"
        )
    if stored and recipe.precision not in (None, stored):
        raise OptionError(
            f"{model} has {stored} weights: leave out precision {recipe.precision}, "
            "or name the checkpoint it was made from"
        )
    if precision := stored or recipe.precision:
        linear_cuda.check_supported(precision, device)


def load_network(
    recipe: Recipe, model: Path, device: torch.device
) -> tuple[Llava, LoraAdapter | None, torch.dtype]:
    """The network with its trained parameters requiring gradients; the new adapter, if one is
    trained; and the type the weights are stored in."""
    on_device = recipe.precision in CUDA_ONLY  # they are quantized on the device only
    network = checkpoints.load(
        model, precision=recipe.precision, device=str(device) if on_device else "cpu"
    )
    if recipe.adapter:
        adapter = attach(network, recipe.adapter, recipe.seed)
    else:
        adapter = None
        network.requires_grad_(True)
    return network, adapter, network.lm_head.weight.dtype
