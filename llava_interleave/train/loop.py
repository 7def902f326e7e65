"""The training loop: AdamW and Muon, learning rate schedule, log, bit-exact resumption."""

from __future__ import annotations

import ctypes
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TextIO, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import kernels
from ..distributed.process_group import ProcessGroup
from ..errors import DataError, OptionError, Unsupported
from ..flops import peak_memory
from . import checkpointing
from .checkpointing import State
from .data.packing import SIGNALS, Position
from .ema import WeightAverage
from .losses import Loss
from .recipe import Recipe


def bf16_is_faster(device: torch.device) -> bool:
    """Whether the device multiplies faster in bfloat16 than in float32."""
    return device.type != "cpu" or kernels.multiplies_bfloat16()


def in_bfloat16(device: torch.device, bfloat16: bool | None) -> bool:
    """Whether matrices are multiplied in bfloat16: where that is wanted and faster.

    None: on a CUDA GPU that has it, whose float32 products take ten times as long.
    """
    if bfloat16 is None:
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return bfloat16 and bf16_is_faster(device)


def autocast(device: torch.device, bfloat16: bool | None) -> torch.autocast:
    """Matrix products in bfloat16, as `in_bfloat16` says."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device, bfloat16))


def device_of(model: nn.Module) -> torch.device:
    """The device that computes; shards of parameters may be in the CPU's memory."""
    p = next(model.parameters())
    return torch.device(p.device_mesh.device_type) if isinstance(p, DTensor) else p.device


@contextmanager
def profiled(
    steps: int, folder: Path, rank: int, log: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """A function to call after each step; `steps` of them, after the first two, are profiled.

    The folder gets a trace for Perfetto or chrome://tracing, and a table of operators by time.
    """
    if not steps:
        yield lambda: None
        return
    cuda = torch.cuda.is_available()

    def write(profile: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / f"trace-{rank}.json.gz"))
        by = f"self_{'cuda' if cuda else 'cpu'}_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=30)
        (folder / f"summary-{rank}.txt").write_text(table, "utf-8")
        log(f"profile: {folder}")

    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[activities.CPU, *([activities.CUDA] if cuda else [])],
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=write,
    ) as profile:
        yield profile.step


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc


@contextmanager
def keeping_freed_memory(device: torch.device) -> Iterator[None]:
    """On a CPU, glibc keeps what a step frees for the next one. Otherwise it gives large tensors
    back to the system, and every page of the next one is zeroed: a tenth of a step.

    The thresholds that are set at the end are those that glibc itself arrives at.
    """
    mallopt = None
    if sys.platform == "linux" and device.type == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Numbers below 1e-38 are zero for this thread and those that it starts meanwhile, so enter it
    before anything is computed.

    Gradients of unlikely tokens are as small, and their squares in AdamW: products with them take a
    CPU 20 times as long.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


B = TypeVar("B")
M_contra = TypeVar("M_contra", bound=nn.Module, contravariant=True)
B_contra = TypeVar("B_contra", contravariant=True)


class LossFunction(Protocol[M_contra, B_contra]):
    def __call__(self, model: M_contra, batch: B_contra, /) -> Loss: ...


M = TypeVar("M", bound=nn.Module)


def train(
    model: M,
    loss: LossFunction[M, B],
    data: Callable[[Position], Iterator[tuple[B, Position]]],
    recipe: Recipe,
    folder: Path,
    *,
    evaluate: Callable[[M, int], Mapping[str, float]] | None = None,
    log_metrics: Callable[[Mapping[str, Any]], None] = lambda _: None,
    log: Callable[[str], None] = print,
    ranks: ProcessGroup = ProcessGroup(),  # noqa: B008  frozen
    peak_flops: float = 0.0,
) -> M:
    """Train `model` in place for `recipe.steps` and return it.

    A checkpoint in `folder` is resumed. Of the model, parameters that require gradients are trained
    with the recipe's learning rate scales; a scale of 0 freezes them.

    data: batches from a position on, each with the position after it. evaluate: given the step, ->
    metrics on held-out samples and of benchmarks; the checkpoint of the best by `recipe.best_by`
    is kept.
    log_metrics: called with every line of log.jsonl. ranks: each calls this with its shards of the
    model and its share of every step's batches; rank 0 writes, and `evaluate` returns the same on
    all. peak_flops: operations a second; with it the log has the MFU.
    SIGTERM, SIGHUP and Ctrl-C, to any rank, finish the step on all, save, and end the program
    (SystemExit 143 or 129, KeyboardInterrupt).
    A step whose loss or gradient norm is not finite changes nothing.
    Raises DataError after more than `recipe.max_skipped_steps` such steps in a row, if weights are
    not finite before a save, if the data end early, memory is not enough or a file cannot be
    written. The last checkpoint then stays as it is.
    """
    steps = _checked_steps(recipe, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    optimizers = build_optimizers(model, recipe)
    average = WeightAverage(model, recipe.ema_decay) if recipe.ema_decay else None
    state = checkpointing.restore(folder, model, optimizers, recipe, ranks, log, average)
    if ranks.rank == 0:  # of the steps that are done again
        for name in ("log.jsonl", "answers.jsonl"):
            drop_lines_after(folder / name, state.step)
    batches = data(state.position)
    meter, last_save, skipped = ThroughputMeter(), time.monotonic(), 0
    with (
        _closing(batches),
        _naming_errors(folder, lambda: state.step),
        open_jsonl(folder / "log.jsonl") if ranks.rank == 0 else nullcontext() as file,
        _catch_signals() as caught,
        ExitStack() as stack,
    ):
        run_log = _RunLog(file, log_metrics, log)
        stack.enter_context(keeping_freed_memory(device_of(model)))
        profiled_step = stack.enter_context(
            profiled(recipe.profile_steps, folder / "profile", ranks.rank, log)
        )

        def evaluated(state: State) -> State:
            """The state after an evaluation, which may be the best."""
            if evaluate is None:
                return state
            model.eval()
            with average.applied(model) if average and recipe.use_ema else nullcontext():
                metrics = evaluate(model, state.step)
            model.train()
            run_log.evaluated(state.step, metrics)
            best = math.inf if state.best is None else state.best[0]
            value = metrics.get(recipe.best_by, math.inf) * (1 if recipe.best_by == "loss" else -1)
            return replace(state, best=(value, state.step)) if value < best else state

        model.train()
        if state.step == 0:
            state = evaluated(state)
        while state.step < steps and not _stops_early(state, recipe):
            last, best_before = state.step + 1 == steps, state.best
            share = recipe.grad_accum_steps // ranks.world_size
            with meter:
                taken = list(islice(batches, share))
                (short,) = ranks.all_reduce_max(len(taken) < (1 if last else share))
                if not short:
                    stats = train_step(
                        model,
                        loss,
                        [batch for batch, _ in taken],
                        optimizers,
                        recipe,
                        state.step,
                        ranks,
                    )
                    meter.add(stats)
                    if average and not stats.skipped:
                        average.update(model)
                    skipped = skipped + 1 if stats.skipped else 0
                    if skipped > recipe.max_skipped_steps:
                        ranks.raise_everywhere(_not_finite(stats, state.step, skipped))
            if not short:
                state = replace(state, step=state.step + 1, position=taken[-1][1])
                if state.step % recipe.log_every == 0 or last:
                    rates = meter.rates(peak_flops)
                    device = device_of(model)
                    if memory := ranks.all_reduce_max(peak_memory(device))[0]:
                        rates["memory_gib"] = memory / 2**30
                    run_log.trained(state.step, steps, stats, skipped, rates)
                every = recipe.evaluate_every
                if last or (every and state.step % every == 0):
                    state = evaluated(state)
            profiled_step()
            elapsed = time.monotonic() - last_save
            timely = recipe.save_minutes and elapsed >= 60 * recipe.save_minutes
            due, number = ranks.all_reduce_max(bool(timely), caught[0] if caught else 0)
            if short and not number:
                ranks.raise_everywhere(
                    DataError(
                        f"the data ended after {state.step:,} of {steps:,} steps: "
                        "give more, or fewer steps"
                    )
                )
            improved, early = state.best != best_before, _stops_early(state, recipe)
            if due or last or number or improved or early or state.step % recipe.save_every == 0:
                if ranks.all_reduce_max(not _weights_are_finite(model))[0]:
                    ranks.raise_everywhere(
                        DataError(
                            f"weights are NaN or infinite after step {state.step:,}, which is not "
                            "saved: lower the learning rate, or look at the data"
                        )
                    )
                path = checkpointing.save(folder, model, optimizers, state, recipe, ranks, average)
                last_save = time.monotonic()
                if number and state.step < steps:
                    log(
                        f"stopped by {signal.Signals(number).name} after step {state.step:,}: "
                        f"{path}; the same call goes on from there"
                    )
                    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if state.step < steps and state.best:
            log(
                f"stopped after step {state.step:,}: no evaluation after step "
                f"{state.best[1]:,} was better"
            )
    return model.eval()


def _stops_early(state: State, recipe: Recipe) -> bool:
    """Whether as many evaluations as `early_stopping` came after the best one."""
    waited = 0 if state.best is None else state.step - state.best[1]
    return 0 < recipe.early_stopping * recipe.evaluate_every <= waited


def _checked_steps(recipe: Recipe, ranks: ProcessGroup) -> int:
    """The number of steps, if the recipe can be trained by so many processes."""
    accumulate = recipe.grad_accum_steps
    assert recipe.steps is not None
    if accumulate % ranks.world_size:
        more = -(-accumulate // ranks.world_size) * ranks.world_size
        ranks.raise_everywhere(
            OptionError(
                f"{ranks.world_size} processes cannot share {accumulate} batches a step evenly: "
                f"give grad_accum_steps {more}, or another number of processes"
            )
        )
    if recipe.muon_lr_scale and ranks.world_size > 1:
        ranks.raise_everywhere(
            Unsupported(
                f"Muon needs whole matrices, and {ranks.world_size} processes have shards: "
                "take muon_lr_scale 0, or one process"
            )
        )
    if recipe.optimizer != "adamw" and ranks.world_size > 1:
        ranks.raise_everywhere(
            Unsupported(
                f"optimizer {recipe.optimizer} needs whole tensors, and {ranks.world_size} "
                "processes have shards: take adamw, whose state is sharded, or one process"
            )
        )
    return recipe.steps


@dataclass(frozen=True)
class _RunLog:
    """log.jsonl and the same in words. file: None on all ranks but 0."""

    file: TextIO | None
    log_metrics: Callable[[Mapping[str, Any]], None]
    log: Callable[[str], None]

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write(step, held_out=dict(metrics))
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.log(f"step {step:,} held out: {values}")

    def trained(
        self, step: int, steps: int, stats: StepStats, skipped: int, rates: Mapping[str, float]
    ) -> None:
        self._write(
            step,
            loss=stats.loss,
            accuracy=stats.accuracy,
            grad_norm=stats.grad_norm,
            learning_rate=stats.learning_rate,
            **stats.extra,
            **({"skipped_steps": skipped} if skipped else {}),
            **rates,
        )
        extra = "".join(f"{name} {value:.3g}  " for name, value in stats.extra.items())
        self.log(
            f"step {step:,} of {steps:,}  loss {stats.loss:.4f}  "
            f"accuracy {stats.accuracy:.1%}  {extra}{_in_words(rates)}"
        )

    def _write(self, step: int, **values: Any) -> None:
        if self.file:
            line = {"step": step, **_finite(values)}
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
            self.file.flush()
            self.log_metrics(line)


def open_jsonl(path: Path) -> TextIO:
    """A file of JSON lines, to append to; an incomplete last line, left by a kill, is removed."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of later steps, and damaged ones, from a file of JSON lines; at step 0, all
    lines."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    kept = kept if step else []
    if kept != lines:
        draft = path.with_name(f".{path.name}.new")
        draft.write_bytes(b"".join(kept))
        draft.replace(path)


def _step_of(line: bytes) -> float:
    """The step of a line of a log; infinity for a damaged one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError):
        return math.inf


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinity as None, which JSON has."""
    return {
        name: _finite(value)
        if isinstance(value, Mapping)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in values.items()
    }


@contextmanager
def _closing(batches: Iterator[Any]) -> Iterator[None]:
    """Close a generator of batches, also after an error, so that its worker processes end."""
    try:
        yield
    finally:
        if isinstance(batches, Generator):
            batches.close()


CLOSED = (ConnectionResetError, ConnectionRefusedError)
"""Errors of reading from a data worker that was killed while it sent a batch."""


@contextmanager
def _naming_errors(folder: Path, step: Callable[[], int]) -> Iterator[None]:
    """Errors of memory and of the disk as a DataError with a way out."""
    try:
        yield
    except (MemoryError, RuntimeError, EOFError, *CLOSED) as error:
        if (text := str(error)).startswith("DataLoader worker") or isinstance(
            error, EOFError | ConnectionError
        ):
            raise DataError(
                f"a data worker ended in step {step() + 1:,} ({text}): if memory was short, lower "
                "--workers; the same call goes on from the last checkpoint"
            ) from error
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate memory" not in text and "bad_alloc" not in text:
            raise
        raise DataError(
            f"out of memory in step {step() + 1:,} ({error}): lower --tokens or --images, or take "
            "--activation-checkpointing"
        ) from error
    except OSError as error:
        raise DataError(
            f"training in {folder} stopped after step {step():,}: {error}; the same call goes on "
            "from the last checkpoint"
        ) from error


def _not_finite(stats: StepStats, step: int, skipped: int) -> DataError:
    what = (
        f"the loss is {stats.loss}"
        if not math.isfinite(stats.loss)
        else f"the gradient norm is {stats.grad_norm}"
    )
    row = f", the {skipped}. in a row" if skipped > 1 else ""
    return DataError(
        f"{what} at step {step:,}{row}: lower the learning rate, or look at the data; "
        "--max-skipped-steps skips such steps"
    )


def _weights_are_finite(model: nn.Module) -> bool:
    return all(
        bool((p.to_local() if isinstance(p, DTensor) else p).isfinite().all())
        for p in model.parameters()
        if p.requires_grad
    )


@dataclass(frozen=True, slots=True)
class StepStats:
    """Metrics of a step, over all ranks.

    loss, accuracy: means over what the loss counts (`count`). learning_rate: the peak one of all
    parameters. tokens, images, flops: the work that was done. skipped: loss or gradient norm were
    not finite, and no weight changed. extra: further means, of this rank.
    """

    loss: float
    accuracy: float
    grad_norm: float
    learning_rate: float
    count: int
    tokens: int
    images: int
    flops: float
    skipped: bool
    extra: Mapping[str, float]


def train_step(
    model: M,
    loss: LossFunction[M, B],
    batches: Sequence[B],
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    number: int,
    ranks: ProcessGroup = ProcessGroup(),  # noqa: B008  frozen
) -> StepStats:
    """One optimizer step on the sum of the losses of all ranks, divided by their common count.

    The random state of a batch (LoRA dropout) comes from its number, so that a resumed run drops
    the same, on any number of ranks.
    """
    learning_rate = recipe.lr * recipe.lr_factor(number)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate
    parts: list[Loss] = []
    for index, batch in enumerate(batches):
        seed = number * recipe.grad_accum_steps + index * ranks.world_size + ranks.rank
        torch.manual_seed(seed)
        with autocast(device_of(model), recipe.bfloat16):
            part = loss(model, batch)
        part.total.backward()
        parts.append(part)
    columns = [
        (part.total.item(), part.count, part.correct, part.tokens, part.images, part.flops)
        for part in parts
    ]
    total, count, correct, tokens, images, flops = ranks.all_reduce_sum(
        *(sum(column) for column in zip(*columns, strict=True))
    )
    mean = total / count
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([_norms(gradient) for gradient in gradients])
    grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm) / count
    skipped = not (math.isfinite(mean) and math.isfinite(grad_norm))
    if not skipped:  # the mean's gradient, clipped, in one pass over memory
        for gradient in gradients:
            gradient.mul_(min(1.0, recipe.max_grad_norm / (grad_norm + 1e-6)) / count)
    for optimizer in optimizers:
        if not skipped:
            optimizer.step()
        optimizer.zero_grad()
    return StepStats(
        mean,
        correct / count,
        grad_norm,
        learning_rate,
        int(count),
        int(tokens),
        int(images),
        flops,
        skipped,
        {
            name: sum(part.extra[name] for part in parts)
            / max(1, sum(part.count for part in parts))
            for name in parts[0].extra
        },
    )


def _norms(gradient: Tensor) -> Tensor:
    """A tensor of the same norm: on a CPU the norms of a matrix's rows. There PyTorch adds all
    squares of a tensor one after another in float32: of 155 million the norm is 2 % too small."""
    whole = isinstance(gradient, DTensor) or gradient.device.type != "cpu" or gradient.dim() < 2
    return gradient if whole else gradient.flatten(1).norm(dim=1)


class ThroughputMeter:
    """Work a second of the time in steps (waiting for data included) since the last `rates`."""

    def __init__(self) -> None:
        self.seconds, self.done = 0.0, [0.0] * 4

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.began

    def add(self, stats: StepStats) -> None:
        work = (stats.count, stats.tokens, stats.images, stats.flops)
        self.done = [a + b for a, b in zip(self.done, work, strict=True)]

    def rates(self, peak_flops: float) -> dict[str, float]:
        """What is known of the rates: counted, tokens and images a second, and the MFU."""
        names = (
            *("loss_tokens_per_second", "tokens_per_second", "images_per_second"),
            "mfu",
        )
        scales = (1.0, 1.0, 1.0, 1 / peak_flops if peak_flops else 0.0)
        rates = {
            name: n * scale / self.seconds
            for name, n, scale in zip(names, self.done, scales, strict=True)
            if n * scale
        }
        self.seconds, self.done = 0.0, [0.0] * 4
        return rates


def _in_words(rates: Mapping[str, float]) -> str:
    if "tokens_per_second" not in rates:
        return f"{rates['loss_tokens_per_second']:,.0f} a second"
    forms = {
        "tokens_per_second": "{:,.0f} tokens/s",
        "images_per_second": "{:,.1f} images/s",
        "mfu": "MFU {:.0%}",
        "memory_gib": "{:.1f} GiB",
    }
    return "  ".join(form.format(rates[name]) for name, form in forms.items() if name in rates)


@contextmanager
def _catch_signals() -> Iterator[list[signal.Signals]]:
    """A list that gets the first of `SIGNALS`; a second one acts as usual.

    In a thread the list stays empty. A signal that was ignored before stays ignored: a shell has
    its background jobs ignore Ctrl-C.
    """
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def note(number: int, _: FrameType | None) -> None:
        caught.append(signal.Signals(number))
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        restore()


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW and, if it has any parameter, Muon; a learning rate scale of 0 freezes a parameter."""
    for_adamw, for_muon = parameter_groups(model, recipe)
    optimizers = [_adamw(for_adamw, recipe, device_of(model))]
    if for_muon:  # the size of its step is AdamW's (Liu et al. 2025, arXiv 2502.16982)
        optimizers.append(torch.optim.Muon(for_muon, lr=recipe.lr, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _adamw(
    groups: list[dict[str, Any]], recipe: Recipe, device: torch.device
) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True)
    if recipe.optimizer.startswith("paged") and device.type != "cuda":
        raise Unsupported(
            f"optimizer {recipe.optimizer} pages the memory of a CUDA GPU, and the device is "
            f"{device.type}: take adamw8bit"
        )
    try:
        optim = import_module("bitsandbytes.optim")
    except ImportError as error:
        raise Unsupported(
            f"optimizer {recipe.optimizer} needs bitsandbytes: pip install 'llava-interleave[gpu]'"
        ) from error
    kind = optim.PagedAdamW8bit if recipe.optimizer.startswith("paged") else optim.AdamW8bit
    found: torch.optim.Optimizer = kind(groups, lr=recipe.lr, betas=(0.9, recipe.beta2))
    return found


PARTS = (
    ("tower", ("vision_tower.",)),
    ("projector", ("multi_modal_projector.",)),
    ("decoder", ("language_model.", "lm_head.")),
)


def freeze(model: nn.Module, recipe: Recipe, log: Callable[[str], None]) -> None:
    """Freeze parameters with a learning rate scale of 0; log a table of trained and frozen ones."""
    groups = [group for some in parameter_groups(model, recipe) for group in some]
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    log(f"{'':<10}{'trained':>16}{'frozen':>16}  learning rate")
    for part, prefixes in PARTS:
        mine = [p for name, p in model.named_parameters() if name.startswith(prefixes)]
        trained = [p for p in mine if id(p) in scale]
        scales = sorted({scale[id(p)] for p in trained})
        rates = " and ".join(f"{recipe.lr * one:g}" for one in scales) or "frozen"
        count = sum(p.numel() for p in trained)
        frozen = sum(p.numel() for p in mine) - count
        log(f"{part:<10}{count:>16,}{frozen:>16,}  {rates}")


def parameter_groups(
    model: nn.Module, recipe: Recipe
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parameter groups of AdamW and of Muon; a learning rate scale of 0 freezes a parameter."""
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = recipe.lr_scale(name)
        parameter.requires_grad_(parameter.requires_grad and scale > 0)
        if not parameter.requires_grad:
            continue
        matrix = parameter.dim() > 1
        embedding = "embed" in name or name.startswith("lm_head")
        muon = recipe.muon_lr_scale > 0 and parameter.dim() == 2 and not embedding
        scale = scale * recipe.muon_lr_scale if muon else scale
        groups.setdefault((muon, scale, matrix), []).append(parameter)
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for (muon, scale, matrix), params in groups.items():
        weight_decay = recipe.weight_decay if matrix else 0.0
        found[muon].append({"params": params, "lr_scale": scale, "weight_decay": weight_decay})
    return found
