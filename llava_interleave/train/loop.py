"""One training loop: AdamW and Muon, warm-up and cosine, JSONL log, checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import DataError
from .batch import Position
from .loss import Loss


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train.

    steps: how many times the weights change.
    lr: peak learning rate; it rises over `warmup` steps and falls along a cosine to `final` times the peak.
    scales: factor on the learning rate of parameters whose name starts with the key; 0 freezes them.
    decay: weight decay of matrices (vectors have none).
    beta2: decay of AdamW's second moment; the first is 0.9.
    muon: factor on the learning rate of matrices but embeddings, which are stepped by Muon then, its step as large as AdamW's
        would be (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982); 0 leaves all to AdamW.
    clip: largest norm of a step's gradient.
    accumulate: batches a step; their losses are summed and divided by the step's count.
    bfloat16: multiply matrices in bfloat16; weights, sums and the optimiser stay float32.
    save_every: steps between checkpoints.
    log_every: steps between log lines.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 100
    final: float = 0.02
    scales: tuple[tuple[str, float], ...] = ()
    decay: float = 0.05
    beta2: float = 0.98
    muon: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    bfloat16: bool = False
    save_every: int = 500
    log_every: int = 10

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


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
    say: Callable[[str], None] = print,
) -> M:
    """Train `model` in place and return it; goes on from the checkpoint in `folder` if there is one.

    Raises DataError if the data end early or the loss is not a number; the last checkpoint stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimisers = make(model, config)
    step, position = restore(folder, model, optimisers, config)
    model.train()
    source = data(position)
    began, tokens = time.perf_counter(), 0
    with (folder / "log.jsonl").open("a") as log:
        while step < config.steps:
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = config.lr * group["scale"] * config.rate(step)
            taken = []
            for _ in range(config.accumulate):
                try:
                    batch, position = next(source)
                except StopIteration:
                    raise DataError(
                        f"the data ended after {step:,} of {config.steps:,} steps: give more, or fewer steps"
                    ) from None
                taken.append(batch)
            parts = []
            for batch in taken:
                with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=config.bfloat16):
                    part = loss(model, batch)
                part.total.backward()
                parts.append(part)
            count = sum(part.count for part in parts)
            value = sum(part.total.item() for part in parts) / count
            if not math.isfinite(value):
                raise DataError(f"the loss is {value} at step {step:,}: lower the learning rate, or look at the data")
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= count
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.clip))
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            step, tokens = step + 1, tokens + count
            if step % config.log_every == 0 or step == config.steps:
                rate = tokens / (time.perf_counter() - began)
                right = sum(part.right for part in parts) / count
                line = {
                    "step": step,
                    "loss": value,
                    "right": right,
                    "norm": norm,
                    "lr": config.lr * config.rate(step - 1),
                    "rate": rate,
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
                say(f"step {step:,} of {config.steps:,}  loss {value:.4f}  right {right:.1%}  {rate:,.0f} learnt tokens/s")
            if step % config.save_every == 0 or step == config.steps:
                checkpoint(folder, model, optimisers, step, position, config)
    return model.eval()


def make(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for what `groups` gives it, and Muon for the rest, if anything."""
    for_adamw, for_muon = groups(model, config)
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(for_adamw, lr=config.lr, betas=(0.9, config.beta2), fused=True)]
    if for_muon:
        made.append(torch.optim.Muon(for_muon, lr=config.lr, adjust_lr_fn="match_rms_adamw"))
    return made


def groups(model: nn.Module, config: TrainConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parameters of AdamW and of Muon, by learning-rate scale and weight decay; those with scale 0 are frozen."""
    found: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = next((s for prefix, s in config.scales if name.startswith(prefix)), 1.0)
        parameter.requires_grad_(scale > 0)
        muon = config.muon > 0 and parameter.dim() == 2 and "embed" not in name and not name.startswith("lm_head")
        if scale > 0:
            found.setdefault((muon, scale * config.muon if muon else scale, parameter.dim() > 1), []).append(parameter)
    made: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for (muon, scale, matrix), params in found.items():
        made[muon].append({"params": params, "scale": scale, "weight_decay": config.decay if matrix else 0.0})
    return made


def checkpoint(
    folder: Path,
    model: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    step: int,
    position: Position,
    config: TrainConfig,
) -> None:
    """Write weights, optimisers and position beside the last checkpoint, then put them in its place."""
    new, old, gone = folder / "checkpoint.new", folder / "checkpoint", folder / "checkpoint.old"
    for path in (new, gone):
        shutil.rmtree(path, ignore_errors=True)
    new.mkdir()
    moments = {
        f"{number}.{index}.{name}": value
        for number, optimiser in enumerate(optimisers)
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }
    save_file(dict(model.named_parameters()), new / "model.safetensors")
    save_file(moments, new / "optimiser.safetensors")
    facts = {"step": step, "position": asdict(position), "config": asdict(config)}
    (new / "state.json").write_text(json.dumps(facts, indent=1))
    if old.exists():
        old.replace(gone)
    new.replace(old)
    shutil.rmtree(gone, ignore_errors=True)


def restore(folder: Path, model: nn.Module, optimisers: list[torch.optim.Optimizer], config: TrainConfig) -> tuple[int, Position]:
    """Take up the checkpoint in `folder`, if there is one: (step, position). Raises DataError if it is of another config."""
    last = next((p for p in (folder / "checkpoint", folder / "checkpoint.old") if (p / "state.json").exists()), None)
    if last is None:
        return 0, Position()
    facts = json.loads((last / "state.json").read_text())
    want = json.loads(json.dumps(asdict(replace(config, save_every=0, log_every=0))))
    have = facts["config"] | {"save_every": 0, "log_every": 0}
    if want != have:
        other = ", ".join(f"{k}: {have.get(k)!r} there, {want[k]!r} here" for k in want if want[k] != have.get(k))
        raise DataError(f"{last} is of a run with another config ({other}); take another folder, or delete it")
    weights = load_file(last / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    moments = load_file(last / "optimiser.safetensors")
    for number, optimiser in enumerate(optimisers):
        fresh = optimiser.state_dict()
        fresh["state"] = {}
        for key, value in moments.items():
            whose, index, name = key.split(".", 2)
            if int(whose) == number:
                fresh["state"].setdefault(int(index), {})[name] = value
        optimiser.load_state_dict(fresh)
    return facts["step"], Position(**facts["position"])
