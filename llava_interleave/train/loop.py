"""One training loop: AdamW and Muon, warm-up and decay, a log, checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, Protocol, TextIO, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .. import kernels
from ..distributed.process_group import ProcessGroup
from ..errors import DataError, OptionError, Unsupported
from . import checkpointing
from .checkpointing import State
from .flops import memory
from .losses import Loss
from .packing import Position


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train.

    steps: how many times the weights change.
    lr: peak learning rate; it rises over `warmup` steps and falls to `final` times the peak, along a cosine or, `linear`, a line.
    scales: factor on the learning rate of parameters whose name starts with the key; 0 freezes them. only: freezes all
        parameters in whose name it is not.
    decay: weight decay of matrices (vectors have none).
    beta2: decay of AdamW's second moment; the first is 0.9.
    muon: factor on the learning rate of matrices but embeddings, which are stepped by Muon then, its step as large as AdamW's
        would be (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982); 0 leaves all to AdamW.
    clip: largest norm of a step's gradient.
    accumulate: batches a step, of all ranks together; their losses are summed and divided by the step's count.
    bfloat16: multiply matrices in bfloat16, where that is faster; weights, sums and the optimiser stay float32.
    save_every: steps between checkpoints; save_minutes: minutes between them, too, if not 0; keep: how many of the last are kept.
    evaluate_every: steps between measurements; with 0 there is one before and one after.
    log_every: steps between log lines.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 100
    final: float = 0.02
    scales: tuple[tuple[str, float], ...] = ()
    only: str = ""
    decay: float = 0.05
    beta2: float = 0.98
    muon: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    bfloat16: bool = False
    linear: bool = False
    save_every: int = 500
    save_minutes: float = 0.0
    keep: int = 1
    evaluate_every: int = 0
    log_every: int = 10

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1 - done if self.linear else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (1 - self.final) * left


def bf16_is_faster(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there than in float32."""
    return device.type != "cpu" or kernels.multiplies_bfloat16()


def autocast(device: torch.device, bfloat16: bool) -> torch.autocast:
    """Products in bfloat16, if they are wanted and `pays`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16 and bf16_is_faster(device))


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
    config: TrainConfig,
    folder: Path,
    *,
    measure: Callable[[M, int], Mapping[str, float]] | None = None,
    watch: Callable[[Mapping[str, Any]], None] = lambda _: None,
    about: Mapping[str, Any] = MappingProxyType({}),
    say: Callable[[str], None] = print,
    ranks: ProcessGroup = ProcessGroup(),  # noqa: B008  frozen
    fastest: float = 0.0,
) -> M:
    """Train `model` in place and return it; goes on from the newest checkpoint in `folder` if there is one.

    measure: told the step, what it finds in data that are held out, `loss` among it; the best by that is kept. watch: handed
    every line of the log. about: stored with every checkpoint. ranks: of several, each calls this with its shards of the model
    and its share of every step's data; rank 0 writes, and `measure` finds the same on all. fastest: operations a second of which
    the log tells the share that steps had (MFU), if it is given.
    SIGTERM and Ctrl-C, to any rank, end the step of all, save, and then end the program (SystemExit 143, KeyboardInterrupt).
    Raises DataError if the data end early, the loss is not a number or a checkpoint cannot be written; the last one stays.
    """
    if config.accumulate % ranks.world_size:
        more = -(-config.accumulate // ranks.world_size) * ranks.world_size
        uneven = (
            f"{ranks.world_size} processes cannot share {config.accumulate} batches a step evenly"
        )
        ranks.raise_everywhere(
            OptionError(f"{uneven}: give accumulate {more}, or another number of processes")
        )
    if config.muon and ranks.world_size > 1:
        ranks.raise_everywhere(
            Unsupported(
                f"Muon needs whole matrices, and {ranks.world_size} processes have shards: take muon=0, or one"
            )
        )
    share = config.accumulate // ranks.world_size
    folder.mkdir(parents=True, exist_ok=True)
    optimisers = make(model, config)
    state = checkpointing.restore(folder, model, optimisers, config, ranks)
    source = data(state.position)
    pace, saved = ThroughputMeter(), time.monotonic()
    with (
        appending(folder / "log.jsonl") if ranks.rank == 0 else nullcontext() as file,
        _stopping() as stop,
    ):

        def log(step: int, **more: Any) -> None:
            if file:
                line = {"step": step, **more}
                file.write(json.dumps(line) + "\n")
                file.flush()
                watch(line)

        def look(state: State) -> State:
            """Measure, and take note of the best."""
            if measure is None:
                return state
            model.eval()
            found = measure(model, state.step)
            model.train()
            log(state.step, held_out=dict(found))
            say(
                f"step {state.step:,} held out: "
                + "  ".join(f"{name} {value:.4f}" for name, value in found.items())
            )
            better = found["loss"] < (math.inf if state.best is None else state.best[0])
            return replace(state, best=(found["loss"], state.step)) if better else state

        model.train()
        if state.step == 0:
            state = look(state)
        while state.step < config.steps:
            last, before = state.step + 1 == config.steps, state.best
            with pace:
                taken = list(islice(source, share))
                (short,) = ranks.all_reduce_max(len(taken) < (1 if last else share))
                whole = not short
                if whole:
                    told = step(
                        model,
                        loss,
                        [batch for batch, _ in taken],
                        optimisers,
                        config,
                        state.step,
                        ranks,
                    )
                    pace.add(told)
            if whole:
                state = replace(state, step=state.step + 1, position=taken[-1][1])
                if state.step % config.log_every == 0 or last:
                    rates = pace.rates(fastest)
                    if took := ranks.all_reduce_max(memory(next(model.parameters()).device))[0]:
                        rates["memory"] = took / 2**30
                    log(
                        state.step,
                        loss=told.loss,
                        right=told.right,
                        norm=told.norm,
                        lr=told.lr,
                        **rates,
                    )
                    say(
                        f"step {state.step:,} of {config.steps:,}  loss {told.loss:.4f}  right {told.right:.1%}  {_told(rates)}"
                    )
                if last or (config.evaluate_every and state.step % config.evaluate_every == 0):
                    state = look(state)
            timely = config.save_minutes and time.monotonic() - saved >= 60 * config.save_minutes
            due, number = ranks.all_reduce_max(bool(timely), stop[0] if stop else 0)
            if not whole and not number:
                ended = f"the data ended after {state.step:,} of {config.steps:,} steps: give more, or fewer steps"
                ranks.raise_everywhere(DataError(ended))
            if due or last or number or state.best != before or state.step % config.save_every == 0:
                where = checkpointing.save(
                    folder, model, optimisers, state, config, dict(about), ranks
                )
                saved = time.monotonic()
                if number and state.step < config.steps:
                    name = signal.Signals(number).name
                    say(
                        f"stopped by {name} after step {state.step:,}: {where}; the same call goes on from there"
                    )
                    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
    return model.eval()


def appending(path: Path) -> TextIO:
    """A file of lines, to write more; what a kill left of a last one is taken off."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class StepStats:
    """What a step was like: loss and share right of what it counted, norm of its gradient, peak rate, and how much it was."""

    loss: float
    right: float
    norm: float
    lr: float
    count: int
    tokens: int
    crops: int
    flops: float


def step(
    model: M,
    loss: LossFunction[M, B],
    taken: Sequence[B],
    optimisers: list[torch.optim.Optimizer],
    config: TrainConfig,
    number: int,
    ranks: ProcessGroup = ProcessGroup(),  # noqa: B008  frozen
) -> StepStats:
    """Change the weights once, by the gradient of the summed losses of all ranks divided by their common count.

    What is left out at random (an adapter's dropout) is decided by the batch's number, so that a resumed run leaves out the same,
    on however many ranks.
    """
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = config.lr * group["scale"] * config.rate(number)
    parts: list[Loss] = []
    for index, batch in enumerate(taken):
        torch.manual_seed(number * config.accumulate + index * ranks.world_size + ranks.rank)
        with autocast(next(model.parameters()).device, config.bfloat16):
            part = loss(model, batch)
        part.total.backward()
        parts.append(part)
    columns = [
        (part.total.item(), part.count, part.right, part.tokens, part.crops, part.flops)
        for part in parts
    ]
    total, count, right, tokens, crops, flops = ranks.all_reduce_sum(
        *(sum(column) for column in zip(*columns, strict=True))
    )
    value = total / count
    if not math.isfinite(value):
        ranks.raise_everywhere(
            DataError(
                f"the loss is {value} at step {number:,}: lower the learning rate, or look at the data"
            )
        )
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= count
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    rate = config.lr * config.rate(number)
    return StepStats(
        value, right / count, float(norm), rate, int(count), int(tokens), int(crops), flops
    )


class ThroughputMeter:
    """How much is done in a second, of the time spent in steps (waiting for data included) since it was last asked."""

    def __init__(self) -> None:
        self.seconds, self.done = 0.0, [0.0] * 4

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.began

    def add(self, told: StepStats) -> None:
        self.done = [
            a + b
            for a, b in zip(
                self.done, (told.count, told.tokens, told.crops, told.flops), strict=True
            )
        ]

    def rates(self, fastest: float) -> dict[str, float]:
        """Counted, tokens and crops a second, and operations as a share of `fastest`, so far as they are known; begins anew."""
        names = ("rate", "tokens", "crops", "mfu")
        scales = (1.0, 1.0, 1.0, 1 / fastest if fastest else 0.0)
        found = {
            name: n * by / self.seconds
            for name, n, by in zip(names, self.done, scales, strict=True)
            if n * by
        }
        self.seconds, self.done = 0.0, [0.0] * 4
        return found


def _told(rates: Mapping[str, float]) -> str:
    if "tokens" not in rates:
        return f"{rates['rate']:,.0f} a second"
    forms = {
        "tokens": "{:,.0f} tokens/s",
        "crops": "{:,.1f} images/s",
        "mfu": "MFU {:.0%}",
        "memory": "{:.1f} GiB",
    }
    return "  ".join(form.format(rates[name]) for name, form in forms.items() if name in rates)


@contextmanager
def _stopping() -> Iterator[list[signal.Signals]]:
    """A list that gets the first SIGTERM or SIGINT; a second one does what it always does. In a thread it stays empty.

    What was ignored before stays so: a shell has its background jobs ignore Ctrl-C.
    """
    stop: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {
        number: signal.getsignal(number) or signal.SIG_DFL
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def note(number: int, _: FrameType | None) -> None:
        stop.append(signal.Signals(number))
        back()

    def back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        back()


def make(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for what `groups` gives it, and Muon for the rest, if anything."""
    for_adamw, for_muon = groups(model, config)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(for_adamw, lr=config.lr, betas=(0.9, config.beta2), fused=True)
    ]
    if for_muon:
        made.append(torch.optim.Muon(for_muon, lr=config.lr, adjust_lr_fn="match_rms_adamw"))
    return made


PARTS = (
    ("tower", ("vision_tower.",)),
    ("projector", ("multi_modal_projector.",)),
    ("decoder", ("language_model.", "lm_head.")),
)


def parts(model: nn.Module, config: TrainConfig, say: Callable[[str], None]) -> None:
    """Freeze what is not trained, and tell of each part how many parameters are trained and frozen, and at which peak rate."""
    made = [group for some in groups(model, config) for group in some]
    scale = {id(p): group["scale"] for group in made for p in group["params"]}
    say(f"{'':<10}{'trained':>16}{'frozen':>16}  learning rate")
    for part, prefixes in PARTS:
        mine = [p for name, p in model.named_parameters() if name.startswith(prefixes)]
        trained = [p for p in mine if id(p) in scale]
        rates = (
            " and ".join(f"{config.lr * one:g}" for one in sorted({scale[id(p)] for p in trained}))
            or "frozen"
        )
        count, rest = (
            sum(p.numel() for p in some)
            for some in (trained, [p for p in mine if id(p) not in scale])
        )
        say(f"{part:<10}{count:>16,}{rest:>16,}  {rates}")


def groups(
    model: nn.Module, config: TrainConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parameters of AdamW and of Muon, by learning-rate scale and weight decay; those with scale 0 are frozen."""
    found: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = next((s for prefix, s in config.scales if name.startswith(prefix)), 1.0)
        scale = scale if config.only in name else 0.0
        parameter.requires_grad_(scale > 0)
        muon = (
            config.muon > 0
            and parameter.dim() == 2
            and "embed" not in name
            and not name.startswith("lm_head")
        )
        if scale > 0:
            found.setdefault(
                (muon, scale * config.muon if muon else scale, parameter.dim() > 1), []
            ).append(parameter)
    made: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for (muon, scale, matrix), params in found.items():
        made[muon].append(
            {"params": params, "scale": scale, "weight_decay": config.decay if matrix else 0.0}
        )
    return made
