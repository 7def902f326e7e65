"""The start of a run: read and check the samples, begin the run's folder, load the network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checkpoints
from ..errors import DataError, OptionError, Unsupported
from ..lora import LoraAdapter, attach
from ..model import Llava
from ..quantization import linear_cuda
from ..quantization.precision import CUDA_ONLY
from . import checkpointing
from .data import datasets, formats, index
from .data.datasets import RawSample
from .data.index import Index, StoredSamples
from .data.samples import SampleFormat
from .data.validate import ValidatedSample, stats
from .recipe import Recipe, changed_settings, read

DATA = "samples.json"


def prepare_samples(
    recipe: Recipe, model: Path, form: SampleFormat, out: Path, log: Callable[[str], None]
) -> tuple[StoredSamples, StoredSamples]:
    """Read and check all samples, and begin the run's folder. -> training and held-out samples.

    Raises DataError, OptionError.
    """
    assert recipe.source is not None
    source = recipe.source
    rows = partial(
        datasets.samples, source, media=recipe.media, question=recipe.question, seed=recipe.seed
    )
    seed = recipe.seed if source.suffix in (".yaml", ".yml") else None
    about = {
        "files": index.file_stats([*datasets.files(source), *sorted(model.glob("*.json"))]),
        "media": str(recipe.media),
        "question": recipe.question,
        "form": asdict(form),
        "limits": [recipe.tokens, recipe.images, seed, bool(recipe.dpo), bool(recipe.kto)],
    }
    key = index.key(about)
    stored = index.build(
        recipe.data_cache / key if recipe.data_cache else out / "data",
        key,
        partial(_of_one_kind, rows, recipe),
        formats.processor(model),
        recipe.tokens,
        form,
        partial(_first_error, recipe=recipe),
        log,
    )
    _report_errors(stored, recipe, log)
    samples = stored.samples()
    folder = datasets.is_image_folder(source)
    ratio = (0.1 if folder else 0.0) if recipe.held_out is None else recipe.held_out
    groups = samples.column("group")
    members = {name: np.flatnonzero(groups == number).tolist()
               for number, name in enumerate(stored.groups)} if ratio else {}  # fmt: skip
    out_numbers = np.array(datasets.held_out(members, ratio, recipe.seed), "<i4")
    held_out = StoredSamples(stored.folder, out_numbers)
    training = StoredSamples(stored.folder, np.setdiff1d(samples.numbers, out_numbers))
    log(f"{len(training):,} samples to train on, {len(held_out):,} held out")
    if not training:
        raise DataError(f"nothing of {source} is left to train on: hold out less")
    if recipe.evaluate_every and not held_out and not recipe.evaluate:
        raise OptionError(
            "evaluate_every is for held-out samples and benchmarks, and there are none: give "
            "held_out or evaluate, or leave it out"
        )
    if recipe.early_stopping and recipe.best_by == "loss" and not held_out:
        raise OptionError(
            "early_stopping goes by the held-out loss, and no samples are held out: give held_out, "
            "or best_by one of evaluate"
        )
    _check_resumed_run(recipe, training, held_out, model, out)
    _write(out / "config.toml", recipe.toml())
    if held_out and folder:
        lines = [json.dumps(_question(sample.rows[0])) + "\n" for sample in held_out]
        (out / "held-out.jsonl").write_text("".join(lines), "utf-8")
    return training, held_out


def _of_one_kind(read: Callable[[], Iterator[RawSample]], recipe: Recipe) -> Iterator[RawSample]:
    """Raises DataError for a pair without dpo, and for another sample with it."""
    rows = _without_weights(read()) if recipe.dpo or recipe.kto or recipe.grpo else read()
    if recipe.kto:
        yield from datasets.mismatched(rows)
        return
    for row in rows:
        pair = datasets.sides(row) is not None
        if pair and not recipe.dpo:
            raise DataError(
                f"sample {row.name} has a chosen and a rejected answer, and pairs are for dpo: "
                "take the recipe dpo"
            )
        if recipe.dpo and not pair:
            raise DataError(
                f"sample {row.name} is not a pair of a chosen and a rejected answer, "
                "and dpo learns from pairs only"
            )
        yield row


def _without_weights(rows: Iterator[RawSample]) -> Iterator[RawSample]:
    """Raises DataError for a sample with a weight."""
    for row in rows:
        if formats.has_weight(row.sample):
            raise DataError(
                f"sample {row.name} has a weight, and dpo, kto and grpo have none: leave it out"
            )
        yield row


def _report_errors(stored: Index, recipe: Recipe, log: Callable[[str], None]) -> None:
    """Errors and duplicates. Raises DataError where a sample has an error and none may be left out,
    or where all have errors."""
    if stored.errors and not recipe.skip_errors:
        count = stored.errors - len(stored.faults)
        more = f"; and {count:,} more" if count > 0 else ""
        raise DataError(
            f"{stored.errors:,} of {stored.count:,} samples have errors: "
            f"{'; '.join(stored.faults)}{more}. `llava data check` lists all; "
            "with --skip-errors they are left out"
        )
    for text in stored.left_out() if stored.errors else ():
        log(f"left out: {text}")
    if stored.errors == stored.count:
        raise DataError(
            f"all {stored.count:,} samples of {recipe.source} have errors: "
            "nothing is left to train on"
        )
    if stored.errors:
        log(f"{stored.errors:,} of {stored.count:,} samples were left out")
    if stored.duplicates:
        log(
            f"{stored.duplicates:,} samples have the same text and media as another one; "
            "`llava data check` lists them"
        )


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


def _check_resumed_run(
    recipe: Recipe, training: StoredSamples, held_out: StoredSamples, model: Path, out: Path
) -> None:
    """Raises DataError where `out` has a run with other settings, samples, media or base model."""
    path, config = out / DATA, out / "config.toml"
    resumed = path.exists() and bool(checkpointing.list_checkpoints(out))
    try:
        before = json.loads(path.read_text("utf-8")) if resumed else {}
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}): to resume without comparing data and model with those "
            f"of the start, rm {path}"
        ) from error
    count = len(training) + len(held_out)
    now: dict[str, Any] = {
        "samples": count,
        "digest": training.digest() + held_out.digest(),
        "model": _digests(model, before.get("model", {})),
    }
    if resumed:
        if [before[key] for key in ("samples", "digest")] != [now["samples"], now["digest"]]:
            raise DataError(
                f"{out} has a run on other data ({before['samples']:,} samples there, "
                f"{count:,} here, or as many with other texts or images); take another folder, or "
                "delete it"
            )
        weights = before.get("model", {})
        changed = [
            name
            for name, about in now["model"].items()
            if name in weights and weights[name][-1] != about[-1]
        ]
        if changed:
            raise DataError(
                f"{out} has a run from another {model}: {', '.join(changed)} differs; take another "
                "folder, or delete it"
            )
        stored = read(config).stored() if config.exists() else recipe.stored()
        if settings := changed_settings(stored, recipe):
            raise DataError(
                f"{out} has a run with other settings ({settings}); take another folder, "
                "or delete it"
            )
    out.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(now) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file whole or, if the process is killed, not at all."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(text, "utf-8")
    draft.replace(path)


def about(out: Path) -> dict[str, Any]:
    """What a run's results depend on: hashes of its samples and of the weights it started from."""
    facts = json.loads((out / DATA).read_text("utf-8"))
    return facts | {"model": {name: about[-1] for name, about in facts["model"].items()}}


def _digests(model: Path, known: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Size, times and SHA-256 of a model's weights; files that are as `known` are not read."""

    def digest(path: Path) -> tuple[str, list[Any]]:
        _, *about = next(stats(str(path)))
        before = known.get(path.name, [])
        if before[:-1] == about:
            return path.name, before
        with path.open("rb") as file:
            return path.name, [*about, hashlib.file_digest(file, "sha256").hexdigest()]

    with ThreadPoolExecutor() as pool:
        return dict(pool.map(digest, sorted(model.glob("*.safetensors"))))


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
