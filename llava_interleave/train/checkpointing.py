"""A run's checkpoints in its folder: whole or not there, the last few and the best are kept, a run goes on from the newest.

What is trained lies in safetensors files, of each rank its shards; `torch.distributed.checkpoint` writes them, and reads them
for any other number of ranks.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..distributed.process_group import ProcessGroup
from ..errors import DataError
from .packing import Position

if TYPE_CHECKING:
    from .loop import TrainConfig

UNSEEN = ("save_every", "save_minutes", "keep", "evaluate_every", "log_every")
"""Settings of the loop that change no weight: a run may go on with others."""
MOMENT = "optimiser."
"""Before what optimisers keep of a parameter: this, its name, and after a dot what it is."""
FILE = 256 << 20
"""Bytes of a file, unless one tensor has more: as much is twice in memory while it is written."""


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
    ranks: ProcessGroup = ProcessGroup(),  # noqa: B008  frozen
) -> Path:
    """Write what is trained, the optimisers and the state, then remove what is no longer kept. -> the checkpoint's folder.

    It gets its name when it is whole, so that a kill at any moment leaves the one before. Raises DataError where it cannot be
    written.
    """
    draft, done = folder / "checkpoint.new", named(folder, state.step)
    if ranks.run_on_rank0(done.exists):
        return done
    tensors = _trained(model)
    kept = {id(p): of for optimiser in optimisers for p, of in optimiser.state.items()}
    for name, p in model.named_parameters():
        tensors |= {f"{MOMENT}{name}.{what}": value for what, value in kept.get(id(p), {}).items()}

    def begin() -> None:
        with _writing(done, ranks):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()

    def finish() -> None:
        facts = {**asdict(state), "config": asdict(config), "about": about}
        with _writing(done, ranks):
            (draft / "state.json").write_text(json.dumps(facts, indent=1))
            draft.replace(done)
        best = None if state.best is None else named(folder, state.best[1])
        for old in list_checkpoints(folder)[: -config.keep]:
            if old != best:
                shutil.rmtree(old)

    ranks.run_on_rank0(begin)
    with _writing(done, ranks):
        writer = HuggingFaceStorageWriter(str(draft), _files(tensors), save_distributed=True)
        _quietly(
            state_dict_saver.save, tensors, storage_writer=writer, no_dist=ranks.world_size == 1
        )
    ranks.run_on_rank0(finish)
    return done


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file that each tensor lies in, from 1 on."""
    found, number, held = {}, 1, 0
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > FILE:
            number, held = number + 1, 0
        found[name], held = number, held + tensor.nbytes
    return found


@contextmanager
def _writing(done: Path, ranks: ProcessGroup) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # whatever it was, on whichever rank
            cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, OSError | SafetensorError):
            raise cause from None
        ranks.raise_everywhere(
            DataError(f"cannot write {done}: {cause}; the checkpoints before it are as they were"),
            cause,
        )


def _quietly(do: Callable[..., Any], *words: Any, **more: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is disabled"
        )  # that there is one process is no mistake
        do(*words, **more)


def named(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"checkpoint-{step}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def restore(
    folder: Path,
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    config: TrainConfig,
    ranks: ProcessGroup = ProcessGroup(),  # noqa: B008  frozen
) -> State:
    """Take up the newest checkpoint in `folder`, if there is one. Raises DataError if it is of another config."""
    if (last := ranks.run_on_rank0(lambda: next(reversed(list_checkpoints(folder)), None))) is None:
        return State()
    facts = json.loads((last / "state.json").read_text())
    defaults = {
        f.name: f.default
        for f in dataclasses.fields(config)
        if f.default is not dataclasses.MISSING
    }
    want, have = (
        {
            name: value
            for name, value in json.loads(json.dumps(values)).items()
            if name not in UNSEEN
        }
        for values in (asdict(config), defaults | facts["config"])
    )
    if want != have:
        other = ", ".join(
            f"{k}: {have.get(k)!r} there, {want[k]!r} here" for k in want if want[k] != have.get(k)
        )
        ranks.raise_everywhere(
            DataError(
                f"{last} is of a run with another config ({other}); take another folder, or delete it"
            )
        )
    parameters, tensors = dict(model.named_parameters()), _trained(model)
    for key, stored in (
        HuggingFaceStorageReader(str(last)).read_metadata().state_dict_metadata.items()
    ):
        if key.startswith(MOMENT) and isinstance(stored, TensorStorageMetadata):
            p = parameters[key.removeprefix(MOMENT).rpartition(".")[0]]
            alone = torch.zeros(stored.size, dtype=stored.properties.dtype, device=p.device)
            tensors[key] = torch.zeros_like(p) if stored.size == p.shape else alone
    _read(last, tensors, alone=ranks.world_size == 1)
    kept: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(MOMENT):
            name, _, what = key.removeprefix(MOMENT).rpartition(".")
            kept.setdefault(id(parameters[name]), {})[what] = value
    for optimiser in optimisers:
        for p in (p for group in optimiser.param_groups for p in group["params"] if id(p) in kept):
            optimiser.state[p] = kept[id(p)]
    best = facts.get("best")
    return State(
        facts["step"], Position(**facts["position"]), None if best is None else (best[0], best[1])
    )


def weights(checkpoint: Path, model: nn.Module) -> None:
    """Give what is trained in a whole `model` the weights of a checkpoint."""
    _read(checkpoint, _trained(model), alone=True)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _read(checkpoint: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """Fill tensors, whole or in shards, by their names."""
    _quietly(
        state_dict_loader.load,
        tensors,
        storage_reader=HuggingFaceStorageReader(str(checkpoint)),
        no_dist=alone,
    )
