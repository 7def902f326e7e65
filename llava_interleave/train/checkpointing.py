"""Checkpoints of a run. They appear when complete; the last few and the best are kept.

Trained parameters and optimizer state are safetensors files, each rank's shards apart;
`torch.distributed.checkpoint` writes them, and reads them with any number of ranks.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from .data.packing import Position
from .recipe import Recipe, changed_settings

OPTIMIZER = "optimizer."
"""Prefix of optimizer state; its names are `optimizer.PARAMETER.STATE`."""
FILE_BYTES = 256 << 20
"""Bytes of a file, unless one tensor has more; twice as many are in memory while it is written."""


@dataclass(frozen=True, slots=True)
class State:
    """Progress of a run: steps, data position, (held-out loss, step) of the best evaluation."""

    step: int = 0
    position: Position = Position()  # noqa: RUF009  frozen
    best: tuple[float, int] | None = None


def save(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: State,
    recipe: Recipe,
    ranks: ProcessGroup = ProcessGroup(),  # noqa: B008  frozen
) -> Path:
    """Write trained parameters, optimizers and state; then remove old checkpoints. -> its folder.

    The folder gets its name when it is complete, so that a kill at any moment leaves the checkpoint
    before. Raises DataError where it cannot be written.
    """
    draft, done = folder / "checkpoint.new", named(folder, state.step)
    if ranks.run_on_rank0(done.exists):
        return done
    tensors = _trained(model)
    kept = {id(p): of for optimizer in optimizers for p, of in optimizer.state.items()}
    for name, p in model.named_parameters():
        tensors |= {f"{OPTIMIZER}{name}.{key}": value for key, value in kept.get(id(p), {}).items()}

    def begin() -> None:
        with _writing(done, ranks):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()

    def finish() -> None:
        facts = {**asdict(state), "recipe": recipe.stored()}
        with _writing(done, ranks):
            (draft / "state.json").write_text(json.dumps(facts, indent=1))
            draft.replace(done)
        best = None if state.best is None else named(folder, state.best[1])
        for old in list_checkpoints(folder)[: -recipe.keep]:
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
    """The number of each tensor's file, from 1 on."""
    files, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > FILE_BYTES:
            number, size = number + 1, 0
        files[name], size = number, size + tensor.nbytes
    return files


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


def _quietly(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is disabled"
        )  # that there is one process is no mistake
        fn(*args, **kwargs)


def named(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return folder / f"checkpoint-{step}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def restore(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: Recipe,
    ranks: ProcessGroup = ProcessGroup(),  # noqa: B008  frozen
) -> State:
    """Load the newest checkpoint in `folder`, if there is one.

    Raises DataError if it was saved with other settings that change the weights.
    """
    if (last := ranks.run_on_rank0(lambda: next(reversed(list_checkpoints(folder)), None))) is None:
        return State()
    facts = json.loads((last / "state.json").read_text())
    if changed := changed_settings(facts["recipe"], recipe):
        ranks.raise_everywhere(
            DataError(
                f"{last} was trained with other settings ({changed}); take another folder, "
                "or delete it"
            )
        )
    parameters, tensors = dict(model.named_parameters()), _trained(model)
    for key, stored in (
        HuggingFaceStorageReader(str(last)).read_metadata().state_dict_metadata.items()
    ):
        if key.startswith(OPTIMIZER) and isinstance(stored, TensorStorageMetadata):
            p = parameters[key.removeprefix(OPTIMIZER).rpartition(".")[0]]
            alone = torch.zeros(stored.size, dtype=stored.properties.dtype, device=p.device)
            tensors[key] = torch.zeros_like(p) if stored.size == p.shape else alone
    _read(last, tensors, alone=ranks.world_size == 1)
    kept: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(OPTIMIZER):
            name, _, field = key.removeprefix(OPTIMIZER).rpartition(".")
            kept.setdefault(id(parameters[name]), {})[field] = value
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"] if id(p) in kept):
            optimizer.state[p] = kept[id(p)]
    best = facts.get("best")
    return State(
        facts["step"], Position(**facts["position"]), None if best is None else (best[0], best[1])
    )


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load the trained parameters of a whole `model` from a checkpoint."""
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
