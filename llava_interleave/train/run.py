"""A whole training run by a recipe; called again it resumes.

Under torchrun each rank loads and computes its shard; rank 0 logs and writes checkpoints.
"""

from __future__ import annotations

import json
import math
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import checkpoints, journal, kernels
from ..checkpoints.adapters import write_adapter
from ..checkpoints.load import get_device
from ..distributed.process_group import (
    ProcessGroup,
    init_distributed,
    lost_connections,
    rank_and_world_size,
)
from ..errors import DataError, OptionError, Unsupported
from ..flops import measured_flops
from ..lora import LoraAdapter
from ..model import Llava
from . import checkpointing
from .benchmarks import Benchmarks
from .data.packing import SIGNALS, PlannedPackedDataset, Position, distributed_batches
from .data.samples import SampleFormat, Samples
from .fsdp import enable_activation_checkpointing, fsdp_loss, shard_fsdp
from .grpo import Sampler, grpo_loss
from .loop import LossFunction, autocast, freeze, in_bfloat16, train
from .losses import dpo_loss, kto_loss, sft_loss
from .prepare import check_precision, load_network, prepare_samples
from .recipe import Recipe
from .references import evaluate, reference_logprobs
from .sample_generations import GenerationLogger
from .trackers import track

WINDOW = 128
"""Samples that are packed together."""
LOW = ".low."
"""In the name of every parameter of an adapter, and in no other."""


@kernels.training.everywhere()
def run(recipe: Recipe, out: Path, *, log: Callable[[str], None] = print) -> Path:
    """Train by the recipe, in the folder `out`. -> the checkpoint `out/model` or `out/adapter`.

    All samples are read first. Errors in them end the run or, with `skip_errors`, are listed. The
    folder also gets the resolved recipe, log and checkpoints; `held-out.jsonl`, for `llava batch`,
    of an image folder; and `best`, a checkpoint, if an earlier evaluation was better than the last.
    Called again, it resumes from the newest checkpoint, also with another number of processes.
    Raises CheckpointError, DataError, OptionError, Unsupported.
    """
    if recipe.source is None or recipe.model is None:
        raise OptionError(
            "a run needs source, the samples, and model, the checkpoint to start from"
        )
    if not recipe.steps and not recipe.epochs:
        raise OptionError("a run needs its length: steps, or epochs, passes over all samples")
    model = checkpoints.resolve(recipe.model)

    def hold() -> None:
        lock.enter_context(_locked(out))

    with _exit_on_signals(), ExitStack() as lock, _naming_errors(out):
        with lost_connections():
            ranks, device = init_distributed(
                recipe.device, get_device, timedelta(minutes=recipe.timeout_minutes)
            )
            log = log if ranks.rank == 0 else _no_log
            ranks.run_on_rank0(hold)
            check_shared(out, ranks)
            network, adapter, dtype = _train(recipe, model, out, ranks, device, log)
        name = "adapter" if adapter else "model"
        if ranks.rank:
            return out / name
        if ranks.world_size > 1:  # whole, from the checkpoint of all ranks
            network, adapter, _ = load_network(recipe, model, device)
            freeze(network, recipe, _no_log)
            wide = _in_float32(recipe, device)
            shard_fsdp(network, ProcessGroup(), torch.device("cpu"), wide=wide)
        averaged = bool(recipe.ema_decay) and recipe.use_ema
        if ranks.world_size > 1 or averaged:
            last = checkpointing.list_checkpoints(out)[-1]
            checkpointing.load_weights(last, network, averaged=averaged)

        def write(folder: Path) -> None:
            if adapter:
                write_adapter(folder, adapter, base=recipe.model)
            else:
                checkpoints.save(network, folder, processor_from=model, dtype=dtype)

        return _write(network, out, name, write, log, recipe, averaged=averaged)


def _train(
    recipe: Recipe,
    model: Path,
    out: Path,
    ranks: ProcessGroup,
    device: torch.device,
    log: Callable[[str], None],
) -> tuple[Llava, LoraAdapter | None, torch.dtype]:
    """The part that all ranks run. -> network, adapter, and the type of the stored weights."""
    form = SampleFormat(recipe.template, recipe.anyres, recipe.images_first_ratio)
    if recipe.cpu_offload and ranks.world_size == 1:
        raise OptionError(
            "cpu_offload is for the shards of several processes (torchrun), and this is one: "
            "leave it out"
        )
    ranks.run_on_rank0(lambda: check_precision(recipe, model, device))
    training, held_out = ranks.run_on_rank0(
        lambda: prepare_samples(recipe, model, form, out, log), long=True
    )
    network, adapter, dtype = load_network(recipe, model, device)
    inside = shard_fsdp(
        network,
        ranks,
        device,
        wide=_in_float32(recipe, device),
        cpu_offload=recipe.cpu_offload,
    )
    bfloat16 = in_bfloat16(device, recipe.bfloat16)
    if recipe.bfloat16 and not bfloat16:
        log("this CPU is faster in float32 than in bfloat16, so matrices are multiplied in float32")
    if recipe.activation_checkpointing:
        enable_activation_checkpointing(network)
    samples = Samples(training, model, recipe.seed, form)
    plan = PlannedPackedDataset(
        samples,
        2**40 if recipe.steps else math.ceil(samples.epoch * (recipe.epochs or 0)),
        size=min(WINDOW, len(training)),
        tokens=recipe.tokens,
        seed=recipe.seed,
        images=recipe.images,
    )
    if recipe.epochs:
        steps = ranks.run_on_rank0(
            lambda: checkpointing.stored_steps(out) or _steps(recipe, samples, plan), long=True
        )
        recipe = recipe.but({"steps": steps})
    freeze(network, recipe, log)
    whole = (
        {f"{name}.{key}" for name, of in adapter.replaced.items() for key in of}
        if adapter
        else set()
    )
    if frozen := next(
        (
            name
            for name, p in network.named_parameters()
            if (LOW in name or name in whole) and not p.requires_grad
        ),
        None,
    ):
        table = "modules_to_save" if frozen in whole else "targets"
        ranks.raise_everywhere(
            OptionError(
                f"adapter.{table} has {frozen.split(LOW)[0]}, whose learning rate scale is 0: "
                "raise that, or leave it out"
            )
        )
    loss: LossFunction[Llava, Any] = sft_loss
    if recipe.dpo or recipe.kto:
        if recipe.dpo:
            loss = partial(dpo_loss, recipe.dpo)
        elif recipe.kto:
            loss = partial(kto_loss, recipe.kto)
        pairs = [*training, *held_out]
        references = (
            {}
            if recipe.dpo and not recipe.dpo.reference
            else reference_logprobs(network, inside, recipe, pairs, model, out, ranks, log)
        )
        plan.samples = samples = Samples(training, model, recipe.seed, form, references)
    loss = loss if ranks.world_size == 1 else fsdp_loss(loss, inside)
    data: Callable[[Position], Iterator[tuple[Any, Position]]] = partial(
        distributed_batches, plan, workers=recipe.workers, each=recipe.grad_accum_steps, ranks=ranks
    )
    sampler: Sampler | None = None
    if recipe.grpo:
        if ranks.world_size > 1:
            ranks.raise_everywhere(
                Unsupported("grpo samples answers in one process, not in several")
            )
        reference = None
        if recipe.grpo.beta:
            reference = load_network(recipe.but({"adapter": None}), model, device)[0]
            reference.requires_grad_(False).to(device)
        data = sampler = Sampler(network, samples, recipe, recipe.grpo, out, reference)
        loss = partial(grpo_loss, recipe.grpo)
    count = recipe.sample_generations
    shown = held_out[:: max(1, len(held_out) // max(1, count))][:count]
    generations = GenerationLogger(
        [sample.rows[0] for sample in shown], model, form, out if ranks.rank == 0 else None
    )

    benchmarks = Benchmarks(recipe, model, out, ranks)

    def evaluate_step(network: Llava, step: int) -> Mapping[str, float]:
        metrics: dict[str, float] = {}
        with autocast(device, recipe.bfloat16):
            if sampler and held_out:
                metrics = sampler.evaluate(held_out)
            elif held_out:
                metrics = evaluate(network, loss, samples, held_out, recipe, ranks)
        with torch.no_grad():
            inside(generations, step, log)
            return metrics | (inside(benchmarks, step) if benchmarks.tasks else {})

    dtype_of_products = torch.bfloat16 if bfloat16 else torch.float32
    with track(recipe, out, log, enabled=ranks.rank == 0) as log_metrics:
        train(
            network,
            loss,
            data,
            recipe,
            out,
            evaluate=evaluate_step if held_out or recipe.evaluate else None,
            log_metrics=log_metrics,
            log=log,
            ranks=ranks,
            peak_flops=ranks.all_reduce_sum(measured_flops(device, dtype_of_products))[0],
        )
    return network, adapter, dtype


def _steps(recipe: Recipe, samples: Samples, plan: PlannedPackedDataset) -> int:
    """The optimizer steps of `recipe.epochs`."""
    if recipe.grpo is None:
        return plan.steps(recipe.grad_accum_steps)
    questions = samples.epoch * (recipe.epochs or 0)
    return recipe.grpo.iterations * math.ceil(questions / recipe.grpo.questions)


def check_shared(out: Path, ranks: ProcessGroup) -> None:
    """Raises OptionError on all ranks where one of them does not see the files of rank 0 in `out`:
    each writes its shards of the checkpoints there."""
    if ranks.world_size == 1:
        return
    name = f".seen-by-all-{secrets.token_hex(8)}"

    def write() -> str:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
        return name

    path, patience = out / ranks.run_on_rank0(write), time.monotonic() + 5
    while not path.exists() and time.monotonic() < patience:  # NFS keeps what it has seen
        time.sleep(0.1)
    seen = ranks.all_gather_object((socket.gethostname(), path.exists()))
    ranks.run_on_rank0(lambda: (out / name).unlink())
    if blind := [f"{rank} ({host})" for rank, (host, saw) in enumerate(seen) if not saw]:
        ranks.raise_everywhere(
            OptionError(
                f"{out} is not the folder of all processes: rank {', '.join(blind)} does not see "
                "the files of rank 0; take one on a file system that all hosts share"
            )
        )


@contextmanager
def _naming_errors(out: Path) -> Iterator[None]:
    """Errors of the disk as a DataError that names the run's folder."""
    try:
        yield
    except BrokenPipeError:  # of the output
        raise
    except OSError as error:
        raise DataError(
            f"the run in {out} stopped: {error}; the same call goes on from the last checkpoint"
        ) from error


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program like an error, so that its data processes end, too; a
    second one at once. Under torchrun they end it at once, also in a collective."""
    main = threading.current_thread() is threading.main_thread()
    several = rank_and_world_size()[1] > 1
    handled = [] if several or not main else [
        number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL
    ]  # fmt: skip

    def leave(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    for number in handled:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps other runs out of `out`; a new folder that stays empty is removed.

    Raises DataError where another run is in it.
    """
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".lock"
    try:
        with path.open("wb") as file:
            journal.lock(file, out)
            yield
    finally:  # closed before: Windows removes no open file
        if new and out.exists() and list(out.iterdir()) == [path]:
            path.unlink()
            out.rmdir()


def _in_float32(recipe: Recipe, device: torch.device) -> bool:
    """Trained parameters are float32; a frozen network may keep the type it is stored in."""
    return not (recipe.adapter and in_bfloat16(device, recipe.bfloat16))


def _no_log(_: str) -> None:
    pass


def _write(
    network: Llava,
    out: Path,
    name: str,
    write: Callable[[Path], None],
    log: Callable[[str], None],
    recipe: Recipe,
    *,
    averaged: bool,
) -> Path:
    """Write the trained model and, if an earlier evaluation was better, `best`. -> its folder."""
    done = out / name
    if not done.exists():
        write(done)
    last = checkpointing.list_checkpoints(out)[-1]
    best = json.loads((last / "state.json").read_text())["best"]
    if best is None or best[1] == int(last.name[11:]):
        return done
    by = "held-out loss" if recipe.best_by == "loss" else recipe.best_by
    value = f"{by} {best[0] if recipe.best_by == 'loss' else -best[0]:.4f}"
    if best[1] == 0:
        log(f"no evaluation was better than before training: {value}")
        return done
    if not (out / "best").exists():
        checkpointing.load_weights(checkpointing.named(out, best[1]), network, averaged=averaged)
        write(out / "best")
    log(f"the best evaluation was after step {best[1]:,}, {value}: {out / 'best'}")
    return done
