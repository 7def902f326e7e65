"""Checkpoints of a run. They appear when complete; the last few and the best are kept.

Trained parameters and optimizer state are safetensors files, each rank's shards apart;
`torch.distributed.checkpoint` writes them, and reads them with any number of ranks. `SHA256SUMS`
has the checksums of all files, as sha256sum writes them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
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
from ..errors import CheckpointError, DataError
from .data.packing import Position
from .ema import WeightAverage
from .recipe import Recipe, changed_settings

OPTIMIZER = "optimizer."
"""Prefix of optimizer state; its names are `optimizer.PARAMETER.STATE`."""
AVERAGE = "ema."
"""Prefix of averaged weights."""
FILE_BYTES = 256 << 20
"""Bytes of a file, unless one tensor has more; twice as many are in memory while it is written."""
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class State:
    """Progress of a run: steps, data position, (value, step) of the best evaluation: the held-out
    loss, or the negative score of a benchmark."""

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
    average: WeightAverage | None = None,
) -> Path:
    """Write trained parameters, their average, optimizers and state; then remove old checkpoints.
    -> its folder.

    The folder gets its name when it is complete, so that a kill at any moment leaves the checkpoint
    before. Raises DataError where it cannot be written.
    """
    draft, done = folder / "checkpoint.new", named(folder, state.step)
    if ranks.run_on_rank0(done.exists):
        return done
    tensors = _trained(model) | _averaged(average)
    kept = {id(p): of for optimizer in optimizers for p, of in optimizer.state.items()}
    for name, p in model.named_parameters():
        tensors |= {
            f"{OPTIMIZER}{name}.{key}": torch.as_tensor(value)
            for key, value in kept.get(id(p), {}).items()
            if not key.startswith("qmap")  # constants of bitsandbytes, which all share
        }

    facts = {**asdict(state), "recipe": recipe.stored()}

    def begin() -> None:
        with _writing(done, ranks):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            (draft / "state.json").write_text(json.dumps(facts, indent=1))

    def finish() -> None:
        with _writing(done, ranks):
            lines = [f"{digest}  {name}\n" for name, digest in sorted(checksums.items())]
            (draft / CHECKSUMS).write_text("".join(lines))
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
    checksums = _checksums(draft, [path.name for path in sorted(draft.iterdir())], ranks)
    ranks.run_on_rank0(finish)
    return done


def _checksums(
    folder: Path,
    names: Sequence[str],
    ranks: ProcessGroup = ProcessGroup(),  # noqa: B008  frozen
) -> dict[str, str]:
    """SHA-256 of files, "" of a missing one; the ranks share the work."""

    def digest(name: str) -> str:
        try:
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return ""

    mine = {name: digest(name) for name in names[ranks.rank :: ranks.world_size]}
    return {name: sum_ for part in ranks.all_gather_object(mine) for name, sum_ in part.items()}


def damage(checkpoint: Path, ranks: ProcessGroup = ProcessGroup()) -> str:  # noqa: B008  frozen
    """Which files of a checkpoint are not as they were written, or missing; "" if none is.

    Of a checkpoint of a version that wrote no checksums, only the state is read.
    """

    def listed() -> dict[str, str]:
        try:
            json.loads((checkpoint / "state.json").read_text())
            lines = (checkpoint / CHECKSUMS).read_text("utf-8", "replace").splitlines()
        except FileNotFoundError as error:
            return {} if Path(error.filename).name == CHECKSUMS else {"state.json": "?"}
        except (OSError, ValueError):
            return {"state.json": "?"}
        names = {path.name: "" for path in checkpoint.iterdir() if path.name != CHECKSUMS}
        return names | {
            name: digest for digest, _, name in (line.partition("  ") for line in lines)
        }

    written = ranks.run_on_rank0(listed)
    found = _checksums(checkpoint, list(written), ranks)
    wrong = [name for name, digest in written.items() if found[name] != digest]
    return ", ".join(f"{name} {'differs' if found[name] else 'is missing'}" for name in wrong)


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


def stored_steps(folder: Path) -> int | None:
    """The number of steps of the run in `folder`, if it has a checkpoint that can be read."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return int(json.loads((path / "state.json").read_text())["recipe"]["steps"])
        except (OSError, ValueError):  # damaged
            continue
    return None


def restore(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: Recipe,
    ranks: ProcessGroup = ProcessGroup(),  # noqa: B008  frozen
    log: Callable[[str], None] = print,
    average: WeightAverage | None = None,
) -> State:
    """Load the newest checkpoint in `folder` that is not damaged, if there is one.

    Damaged ones are renamed, `damaged-STEP`. Raises DataError if all are damaged, or if it was
    saved with other settings that change the weights.
    """
    found = ranks.run_on_rank0(lambda: list_checkpoints(folder))
    for last in reversed(found):
        if wrong := damage(last, ranks):
            aside = folder / f"damaged-{last.name[11:]}"
            if last == found[0]:
                ranks.raise_everywhere(
                    DataError(
                        f"{last} is damaged ({wrong}), and there is none before it: to begin anew, "
                        f"rm -r {folder}"
                    )
                )
            log(f"{last} is damaged ({wrong}): it is now {aside}, and the one before is used")
            ranks.run_on_rank0(partial(_set_aside, last, aside))
        else:
            return _restore(last, model, optimizers, recipe, ranks, average)
    return State()


def _set_aside(checkpoint: Path, aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.replace(aside)


def _restore(
    last: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: Recipe,
    ranks: ProcessGroup,
    average: WeightAverage | None,
) -> State:
    facts = json.loads((last / "state.json").read_text())
    if changed := changed_settings(facts["recipe"], recipe):
        ranks.raise_everywhere(
            DataError(
                f"{last} was trained with other settings ({changed}); take another folder, "
                "or delete it"
            )
        )
    parameters = dict(model.named_parameters())
    tensors = _trained(model) | _averaged(average)
    for key, stored in (
        HuggingFaceStorageReader(str(last)).read_metadata().state_dict_metadata.items()
    ):
        if key.startswith(OPTIMIZER) and isinstance(stored, TensorStorageMetadata):
            p = parameters[key.removeprefix(OPTIMIZER).rpartition(".")[0]]
            dtype = stored.properties.dtype
            alone = torch.zeros(stored.size, dtype=dtype, device=p.device)
            tensors[key] = torch.zeros_like(p, dtype=dtype) if stored.size == p.shape else alone
    _read(last, tensors, alone=ranks.world_size == 1)
    kept: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(OPTIMIZER):
            name, _, field = key.removeprefix(OPTIMIZER).rpartition(".")
            kept.setdefault(id(parameters[name]), {})[field] = value
    for optimizer in optimizers:
        for g, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if id(p) in kept:
                    _set_state(optimizer, group, (g, i), kept[id(p)])
    best = facts.get("best")
    return State(
        facts["step"], Position(**facts["position"]), None if best is None else (best[0], best[1])
    )


def _set_state(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    place: tuple[int, int],
    values: dict[str, Tensor],
) -> None:
    p = group["params"][place[1]]
    if init := getattr(optimizer, "init_state", None):  # of bitsandbytes; it may be paged
        init(group, p, *place)
        for key, value in values.items():
            if isinstance(optimizer.state[p].get(key), Tensor):
                optimizer.state[p][key].copy_(value)
            else:
                optimizer.state[p][key] = value.item()
    else:
        optimizer.state[p] = values


def load_weights(checkpoint: Path, model: nn.Module, *, averaged: bool = False) -> None:
    """Load the trained parameters of a whole `model`, or their average, from a checkpoint.

    Raises CheckpointError where it is damaged.
    """
    if wrong := damage(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged: {wrong}")
    prefix = AVERAGE if averaged else ""
    tensors = {f"{prefix}{name}": tensor for name, tensor in _trained(model).items()}
    _read(checkpoint, tensors, alone=True)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _averaged(average: WeightAverage | None) -> dict[str, Tensor]:
    found = {} if average is None else average.tensors
    return {f"{AVERAGE}{name}": tensor for name, tensor in found.items()}


def _read(checkpoint: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """Fill tensors, whole or in shards, by their names."""
    _quietly(
        state_dict_loader.load,
        tensors,
        storage_reader=HuggingFaceStorageReader(str(checkpoint)),
        no_dist=alone,
    )
