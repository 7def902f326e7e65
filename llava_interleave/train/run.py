"""A whole training run by a recipe: read all data, train, measure, write the tuned checkpoint. Called again it goes on.

Started by torchrun it is one of several that do this together: each reads and computes its share, rank 0 tells and writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import checkpoints
from ..checkpoints.adapters import write_adapter
from ..checkpoints.load import device_named
from ..distributed.process_group import ProcessGroup, init_distributed
from ..errors import DataError, OptionError, Unsupported
from ..journal import Journal
from ..lora import LoraAdapter, LoraConfig, attach
from ..model import Llava
from ..quantization import linear_cuda
from ..quantization.precision import CUDA_ONLY
from . import checkpointing, datasets, formats
from .datasets import RawSample
from .flops import rate
from .fsdp import InsideFsdp, enable_activation_checkpointing, fsdp_loss, shard_fsdp
from .loop import LossFunction, TrainConfig, autocast, bf16_is_faster, parts, train
from .losses import DPOLoss, logprobs, sft_loss
from .packing import DummyBatch, Pairs, PlannedPackedDataset, distributed_batches, join, pack
from .recipe import RESUMABLE_FIELDS, Recipe
from .sample_generations import GenerationLogger
from .samples import PackedSample, SampleFormat, Samples
from .validate import ValidatedSample, check

T = TypeVar("T")
TOLD = 5
"""How many faulty samples a refusal names."""
WINDOW = 128
"""Samples that are packed together."""
DATA = "samples.json"
LOW = ".low."
"""In the name of every parameter of an adapter, and in no other."""


def run(recipe: Recipe, out: Path, *, say: Callable[[str], None] = print) -> Path:
    """Train as the recipe says, in the folder `out`. -> the tuned checkpoint, `out/model`, or the adapter, `out/adapter`.

    All samples are read first, and what is wrong with them ends it or, with `skip_errors`, is listed. Beside it the folder
    gets the resolved recipe, log, checkpoints, `held-out.jsonl` for `llava batch` of a folder's held-out pictures, and
    `best`, a checkpoint, if an earlier measurement was better than the last. Called again, it goes on from the newest
    checkpoint, also with another number of processes. Raises CheckpointError, DataError, OptionError, Unsupported.
    """
    if recipe.source is None or recipe.model is None:
        raise OptionError(
            "say what to train with: source, the samples, and model, the checkpoint to begin with"
        )
    if not recipe.steps and not recipe.epochs:
        raise OptionError("say how long to train: steps, or epochs, passes over all samples")
    folder = checkpoints.resolve(recipe.model)
    ranks, device = init_distributed(recipe.device, device_named)
    say = say if ranks.rank == 0 else _nothing
    network, adapter, stored, config = _train(recipe, folder, out, ranks, device, say)
    name = "adapter" if adapter else "model"
    if ranks.rank:
        return out / name
    if ranks.world_size > 1:  # whole, from what all ranks have saved
        network, adapter, _ = _network(recipe, folder, device)
        parts(network, config, _nothing)
        shard_fsdp(network, ProcessGroup(), torch.device("cpu"), wide=_wide(recipe, device))
        checkpointing.weights(checkpointing.list_checkpoints(out)[-1], network)

    def write(done: Path) -> None:
        if adapter:
            write_adapter(done, adapter, base=recipe.model)
        else:
            checkpoints.save(network, done, processor_from=folder, dtype=stored)

    return _write(network, out, name, write, say)


def _train(
    recipe: Recipe,
    folder: Path,
    out: Path,
    ranks: ProcessGroup,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Llava, LoraAdapter | None, torch.dtype, TrainConfig]:
    """What ranks do together. -> network and adapter as they lie here, the type they were stored in, the loop's config."""
    form = SampleFormat(recipe.template, recipe.anyres, recipe.front)
    ranks.run_on_rank0(lambda: _check_precision(recipe, folder, device))
    units, kept = ranks.run_on_rank0(lambda: _samples(recipe, folder, form, out, say))
    network, adapter, stored = _network(recipe, folder, device)
    within = shard_fsdp(network, ranks, device, wide=_wide(recipe, device))
    if recipe.bfloat16 and not bf16_is_faster(device):
        say("this CPU is faster in float32 than in bfloat16, so matrices are multiplied in float32")
    if recipe.recompute:
        enable_activation_checkpointing(network)
    samples = Samples(units, folder, recipe.seed, form)
    count = 2**40 if recipe.steps else math.ceil(len(units) * (recipe.epochs or 0))
    plan = PlannedPackedDataset(
        samples,
        count,
        size=min(WINDOW, len(units)),
        tokens=recipe.tokens,
        seed=recipe.seed,
        images=recipe.images,
    )
    config = _config(recipe, recipe.steps or plan.steps(recipe.accumulate))
    parts(network, config, say)
    if idle := next(
        (name for name, p in network.named_parameters() if LOW in name and not p.requires_grad),
        None,
    ):
        reached = f"adapter.targets reaches {idle.split(LOW)[0]}, where the factor is 0: raise that, or leave it out"
        ranks.raise_everywhere(OptionError(reached))
    loss: LossFunction[Llava, Any] = sft_loss
    if recipe.dpo:
        loss = DPOLoss(recipe.dpo.beta, recipe.dpo.smoothing, recipe.dpo.ipo)
        references = _references(network, within, recipe, [*units, *kept], folder, out, ranks, say)
        plan.samples = samples = Samples(units, folder, recipe.seed, form, references)
    loss = loss if ranks.world_size == 1 else fsdp_loss(loss, within)
    groups = _packed(kept, recipe)
    spaced = kept[:: max(1, len(kept) // max(1, recipe.answers))][: recipe.answers]
    told = GenerationLogger(
        [unit.rows[0] for unit in spaced], folder, form, out if ranks.rank == 0 else None
    )

    def measure(model: Llava, step: int) -> Mapping[str, float]:
        with autocast(device, recipe.bfloat16):
            found = _measure(model, loss, samples, groups, ranks)
        with torch.no_grad():
            within(told, step, say)
        return found

    with _board(out, recipe.tensorboard and ranks.rank == 0) as watch:
        train(
            network,
            loss,
            partial(
                distributed_batches,
                plan,
                workers=recipe.workers,
                each=recipe.accumulate,
                ranks=ranks,
            ),
            config,
            out,
            measure=measure if kept else None,
            watch=watch,
            about=recipe.stored(),
            say=say,
            ranks=ranks,
            fastest=ranks.all_reduce_sum(
                rate(
                    device,
                    torch.bfloat16 if recipe.bfloat16 and bf16_is_faster(device) else torch.float32,
                )
            )[0],
        )
    return network, adapter, stored, config


def _wide(recipe: Recipe, device: torch.device) -> bool:
    """What is trained is float32; a frozen network may stay in the numbers it is stored in."""
    return not (recipe.adapter and recipe.bfloat16 and bf16_is_faster(device))


def _nothing(_: str) -> None:
    pass


def _samples(
    recipe: Recipe, folder: Path, form: SampleFormat, out: Path, say: Callable[[str], None]
) -> tuple[list[PackedSample], list[PackedSample]]:
    """Read and check all samples, and begin the run's folder. -> those to train on, and those held out."""
    assert recipe.source is not None
    found = datasets.rows(
        recipe.source, media=recipe.media, question=recipe.question, seed=recipe.seed
    )
    units = _sound(found, folder, recipe, form, say)
    share = (0.1 if recipe.source.is_dir() else 0.0) if recipe.held_out is None else recipe.held_out
    chosen = {
        row.name for row in datasets.split([unit.rows[0] for unit in units], share, recipe.seed)[1]
    }
    kept = [unit for unit in units if unit.rows[0].name in chosen]
    units = [unit for unit in units if unit.rows[0].name not in chosen]
    say(f"{len(units):,} samples to train on, {len(kept):,} held out")
    if not units:
        raise DataError(f"nothing of {recipe.source} is left to train on: hold out less")
    if recipe.evaluate_every and not kept:
        raise OptionError(
            "evaluate_every measures what is held out, and nothing is: give held_out, or leave it out"
        )
    _same_as_before(recipe, [*units, *kept], out)
    (out / "config.toml").write_text(recipe.toml(), "utf-8")
    if kept and recipe.source.is_dir():
        (out / "held-out.jsonl").write_text(
            "".join(json.dumps(_question(unit.rows[0])) + "\n" for unit in kept), "utf-8"
        )
    return units, kept


def _check_precision(recipe: Recipe, folder: Path, device: torch.device) -> None:
    """Raises Unsupported or OptionError where weights of few bits cannot be those of the run, or not on this device."""
    held = checkpoints.stored_precision(folder)
    if held and not recipe.adapter:
        other = "train an adapter (--adapter-rank), or the checkpoint it was made from"
        raise Unsupported(f"{folder} holds {held} weights, which stay as they are: {other}")
    if held and recipe.precision not in (None, held):
        other = f"leave out precision {recipe.precision}, or name the checkpoint it was made from"
        raise OptionError(f"{folder} holds {held} weights: {other}")
    if few := held or recipe.precision:
        linear_cuda.check_supported(few, device)


def _network(
    recipe: Recipe, folder: Path, device: torch.device
) -> tuple[Llava, LoraAdapter | None, torch.dtype]:
    """The network as it is stored or in the recipe's precision, with a fresh adapter if one is trained, and the type it is stored
    in."""
    there = recipe.precision in CUDA_ONLY  # which are made on the device only
    network = checkpoints.load(
        folder, precision=recipe.precision, device=str(device) if there else "cpu"
    )
    adapter = (
        attach(network, LoraConfig(**dataclasses.asdict(recipe.adapter)), recipe.seed)
        if recipe.adapter
        else None
    )
    return network, adapter, network.lm_head.weight.dtype


def _config(recipe: Recipe, steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        lr=recipe.lr,
        warmup=max(1, math.ceil(recipe.warmup * steps)),
        final=recipe.final,
        linear=recipe.schedule == "linear",
        only=LOW if recipe.adapter else "",
        scales=(
            ("vision_tower.", recipe.tower),
            ("multi_modal_projector.", recipe.projector),
            ("language_model.", recipe.decoder),
            ("lm_head.", recipe.decoder),
        ),
        decay=recipe.decay,
        beta2=recipe.beta2,
        clip=recipe.clip,
        accumulate=recipe.accumulate,
        bfloat16=recipe.bfloat16,
        save_every=recipe.save_every,
        save_minutes=recipe.save_minutes,
        keep=recipe.keep,
        evaluate_every=recipe.evaluate_every,
        log_every=recipe.log_every,
    )


def _sound(
    rows: list[RawSample],
    model: Path,
    recipe: Recipe,
    form: SampleFormat,
    say: Callable[[str], None],
) -> list[PackedSample]:
    """The samples, or pairs, without errors; those left out are listed. DataError where nothing may be, or all would be."""
    if wrong := next((row for row in rows if bool(row.pair) != bool(recipe.dpo)), None):
        raise DataError(
            f"sample {wrong.pair} has a chosen and a rejected answer, and pairs are learnt with dpo: take the recipe dpo"
            if wrong.pair
            else f"sample {wrong.name} is no pair of a chosen and a rejected answer, and dpo learns from nothing else"
        )
    say(f"reading {len(rows):,} samples of {recipe.source}")
    checked = check(rows, formats.processor(model), recipe.tokens, form=form)
    sides = 2 if recipe.dpo else 1
    whole = list(zip(*(checked[side::sides] for side in range(sides)), strict=True))
    faults = [fault for one in whole if (fault := _fault(one, recipe))]
    if faults and not recipe.skip_errors:
        more = f"; and {len(faults) - TOLD:,} more" if len(faults) > TOLD else ""
        raise DataError(
            f"{len(faults):,} of {len(whole):,} samples have errors: {'; '.join(faults[:TOLD])}{more}. `llava data check` lists "
            "all; with --skip-errors they are left out"
        )
    for text in faults:
        say(f"left out: {text}")
    if len(faults) == len(whole):
        raise DataError(
            f"all {len(whole):,} samples of {recipe.source} have errors: nothing is left to train on"
        )
    if faults:
        say(f"{len(faults):,} of {len(whole):,} samples were left out")
    if twins := sum(
        fault.kind == "duplicate" and not fault.error for one in checked for fault in one.faults
    ):
        say(
            f"{twins:,} samples say and show the same as another one; `llava data check` lists them"
        )
    return [
        PackedSample(
            tuple(c.row for c in one),
            sum(c.tokens or 0 for c in one),
            sum(c.front or 0 for c in one),
            one[0].images or 0,
        )
        for one in whole
        if not _fault(one, recipe)
    ]


def _fault(one: Sequence[ValidatedSample], recipe: Recipe) -> str | None:
    """The first error of a sample, or of a pair."""
    if found := next((fault.text for side in one for fault in side.faults if fault.error), None):
        return found
    name, total, images = one[0].row.pair, sum(side.tokens or 0 for side in one), one[0].images or 0
    if name and total > recipe.tokens:
        return f"pair {name} has {total:,} tokens, more than the {recipe.tokens:,} of a batch: raise --tokens, or shorten it"
    if 0 < recipe.images < images:
        what = f"{name or one[0].row.name} has {images:,} images and frames"
        return f"sample {what}, more than the {recipe.images:,} of a batch: raise --images, or show less in it"
    return None


def _question(row: RawSample) -> dict[str, object]:
    """A folder's sample as `llava batch` asks it, with its true answer beside."""
    asked, answer = (turn["value"] for turn in row.sample["conversations"])
    images = [str((row.root / name).absolute()) for name in row.sample["image"]]
    return {"id": row.name, "question": asked, "images": images, "truth": answer}


@torch.no_grad()
def _measure(
    network: Llava,
    loss: LossFunction[Llava, Any],
    samples: Samples,
    groups: Sequence[Sequence[PackedSample]],
    ranks: ProcessGroup,
) -> dict[str, float]:
    """Loss on units that come in batches, each computed by one rank."""
    found = []
    for first in range(0, len(groups), ranks.world_size):
        group, idle = _mine(groups, first, ranks)
        batch = join([samples.make(unit) for unit in group])
        part = loss(network, DummyBatch(batch) if idle else batch)
        found.append((part.total.item(), part.count, part.right))
    total, count, right = ranks.all_reduce_sum(
        *(sum(column) for column in zip(*found, strict=True))
    )
    return {"loss": total / max(1, count), "right": right / max(1, count)}


def _packed(units: Sequence[PackedSample], recipe: Recipe) -> list[list[PackedSample]]:
    """Units that come in batches."""
    found = pack(
        [unit.tokens for unit in units],
        recipe.tokens,
        [unit.images for unit in units],
        recipe.images,
    )
    return [[units[i] for i in group] for group in found]


def _mine(groups: Sequence[T], first: int, ranks: ProcessGroup) -> tuple[T, bool]:
    """Of the groups that all ranks take at once, from number `first` on, this rank's; or, where there are too few, the first, to
    be idle with."""
    idle = first + ranks.rank >= len(groups)
    return groups[first if idle else first + ranks.rank], idle


@torch.no_grad()
def _references(
    network: Llava,
    within: InsideFsdp,
    recipe: Recipe,
    units: Sequence[PackedSample],
    folder: Path,
    out: Path,
    ranks: ProcessGroup,
    say: Callable[[str], None],
) -> dict[str, tuple[float, float]]:
    """What the model thinks of all answers before it is trained, from `reference.jsonl`; what is missing there is computed."""
    network.eval()
    about = {"model": str(folder), "digest": _digest(units)}
    with Journal(out / "reference.jsonl", about) if ranks.rank == 0 else nullcontext() as journal:
        rows = ranks.run_on_rank0(
            lambda: {name: journal.row(name) for name in journal.done} if journal else {}
        )
        left = [unit for unit in units if unit.name not in rows]
        if left:
            say(f"computing the reference of {len(left):,} pairs")
        make = Samples(left, folder, recipe.seed, SampleFormat(recipe.template, recipe.anyres)).make
        groups = _packed(left, recipe)
        for first in range(0, len(groups), ranks.world_size):
            group, idle = _mine(groups, first, ranks)
            batch = join([make(unit) for unit in group])
            assert isinstance(batch, Pairs)
            with autocast(network.lm_head.weight.device, recipe.bfloat16):
                found = within(logprobs, batch).tolist()
            mine = [
                {"id": unit.name, "chosen": a, "rejected": b}
                for unit, (a, b) in zip(group, found, strict=True)
            ]
            told = [row for one in ranks.all_gather_object([] if idle else mine) for row in one]
            rows |= {row["id"]: row for row in told}
            if journal:
                journal.add(told)
    return {unit.name: (rows[unit.name]["chosen"], rows[unit.name]["rejected"]) for unit in units}


def _digest(units: Sequence[PackedSample]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for unit in units:
        for row in unit.rows:
            state.update(
                json.dumps([row.name, row.sample], default=repr).encode("utf-8", "backslashreplace")
            )
    return state.hexdigest()


def _same_as_before(recipe: Recipe, units: Sequence[PackedSample], out: Path) -> None:
    """A run goes on only as it began: with the same settings, and the same samples in the same order."""
    now = {"samples": len(units), "digest": _digest(units)}
    path = out / DATA
    if path.exists() and (there := checkpointing.list_checkpoints(out)):
        before = json.loads(path.read_text("utf-8"))
        if before != now:
            raise DataError(
                f"{out} is of a run with other data ({before['samples']:,} samples there, {now['samples']:,} here, or as many "
                "others); take another folder, or delete it"
            )
        have, want = (
            json.loads((there[-1] / "state.json").read_text())["about"],
            json.loads(json.dumps(recipe.stored())),
        )
        names = sorted(
            name
            for name in (have.keys() | want.keys()) - RESUMABLE_FIELDS
            if have.get(name) != want.get(name)
        )
        if names:
            other = ", ".join(
                f"{name}: {have.get(name)!r} there, {want.get(name)!r} here" for name in names
            )
            raise DataError(
                f"{out} is of a run with other settings ({other}); take another folder, or delete it"
            )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now) + "\n", "utf-8")


@contextmanager
def _board(out: Path, wanted: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What is handed every line of the log: TensorBoard's files in `out`, or nothing. Raises Unsupported without it."""
    if not wanted:
        yield lambda _: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Unsupported(
            "tensorboard is not installed: pip install 'llava-interleave[tensorboard]', or leave it out"
        ) from error

    def watch(line: Mapping[str, Any]) -> None:
        flat = {f"held out/{name}": value for name, value in line.get("held_out", {}).items()}
        flat |= {
            f"train/{name}": value
            for name, value in line.items()
            if name not in ("step", "held_out")
        }
        for name, value in flat.items():
            board.add_scalar(name, value, line["step"])

    with SummaryWriter(str(out / "tensorboard")) as board:
        yield watch


def _write(
    network: Llava, out: Path, name: str, write: Callable[[Path], None], say: Callable[[str], None]
) -> Path:
    """Write what was tuned, and as `best` what it was at the best measurement, if that was not the last. -> its folder."""
    done = out / name
    if not done.exists():
        write(done)
    last = checkpointing.list_checkpoints(out)[-1]
    best = json.loads((last / "state.json").read_text())["best"]
    if best is None or best[1] == int(last.name[11:]):
        return done
    if best[1] == 0:
        say(
            f"no measurement was better than the one before training, a held-out loss of {best[0]:.4f}"
        )
        return done
    if not (out / "best").exists():
        checkpointing.weights(checkpointing.named(out, best[1]), network)
        write(out / "best")
    say(f"the held-out loss was lowest after step {best[1]:,}, {best[0]:.4f}: {out / 'best'}")
    return done
