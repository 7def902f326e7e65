"""A run's checkpoints in its folder: whole or not there, the last few and the best are kept, a run goes on from the newest."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import DataError
from .batch import Position

if TYPE_CHECKING:
    from .loop import TrainConfig

UNSEEN = ("save_every", "save_minutes", "keep", "evaluate_every", "log_every")
"""Settings of the loop that change no weight: a run may go on with others."""


@dataclass(frozen=True, slots=True)
class State:
    """How far a run is: steps done, data read, and (held-out loss, step) of the best measurement."""

    step: int = 0
    position: Position = Position()  # noqa: RUF009  frozen
    best: tuple[float, int] | None = None


def save(
    folder: Path,
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    state: State,
    config: TrainConfig,
    about: dict[str, Any],
) -> Path:
    """Write what is trained, the optimisers and the state, then remove what is no longer kept. -> the checkpoint's folder.

    It gets its name when it is whole, so that a kill at any moment leaves the one before. Raises DataError where it cannot be
    written.
    """
    draft, done = folder / "checkpoint.new", named(folder, state.step)
    if done.exists():
        return done
    shutil.rmtree(draft, ignore_errors=True)
    moments = {
        f"{number}.{index}.{name}": value
        for number, optimiser in enumerate(optimisers)
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }
    facts = {**asdict(state), "config": asdict(config), "about": about}
    try:
        draft.mkdir()
        save_file({name: p for name, p in model.named_parameters() if p.requires_grad}, draft / "model.safetensors")
        save_file(moments, draft / "optimiser.safetensors")
        (draft / "state.json").write_text(json.dumps(facts, indent=1))
        draft.replace(done)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write {done}: {error}; the checkpoints before it are as they were") from error
    best = None if state.best is None else named(folder, state.best[1])
    for old in every(folder)[: -config.keep]:
        if old != best:
            shutil.rmtree(old)
    return done


def named(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"checkpoint-{step}"


def every(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def restore(folder: Path, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer], config: TrainConfig) -> State:
    """Take up the newest checkpoint in `folder`, if there is one. Raises DataError if it is of another config."""
    if (earlier := folder / "checkpoint").is_dir():  # as the one checkpoint was called before there could be several
        earlier.replace(named(folder, json.loads((earlier / "state.json").read_text())["step"]))
    if not (there := every(folder)):
        return State()
    last = there[-1]
    facts = json.loads((last / "state.json").read_text())
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    want, have = (
        {name: value for name, value in json.loads(json.dumps(values)).items() if name not in UNSEEN}
        for values in (asdict(config), defaults | facts["config"])
    )
    if want != have:
        other = ", ".join(f"{k}: {have.get(k)!r} there, {want[k]!r} here" for k in want if want[k] != have.get(k))
        raise DataError(f"{last} is of a run with another config ({other}); take another folder, or delete it")
    weights(last, model)
    moments = load_file(last / "optimiser.safetensors")
    for number, optimiser in enumerate(optimisers):
        fresh = optimiser.state_dict()
        fresh["state"] = {}
        for key, value in moments.items():
            whose, index, name = key.split(".", 2)
            if int(whose) == number:
                fresh["state"].setdefault(int(index), {})[name] = value
        optimiser.load_state_dict(fresh)
    best = facts.get("best")
    return State(facts["step"], Position(**facts["position"]), None if best is None else (best[0], best[1]))


@torch.no_grad()
def weights(checkpoint: Path, model: nn.Module) -> None:
    """Give what is trained in `model` the weights of a checkpoint."""
    stored = load_file(checkpoint / "model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(stored[name])
