"""Experiment trackers: each gets the lines of log.jsonl as numbers by name and step."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import LlavaError, OptionError, Unsupported, with_place
from .recipe import Recipe

Log = Callable[[Mapping[str, float], int], None]
"""(values, step)."""


@contextmanager
def track(
    recipe: Recipe, out: Path, tell: Callable[[str], None], *, enabled: bool
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that sends a line of the log to `recipe.trackers`, if `enabled` (rank 0).

    A run is called as its folder, and a resumed run goes on in it. A tracker that fails later is
    named by `tell`, and training goes on. Raises Unsupported where a tracker is not installed,
    OptionError where it does not start.
    """
    with ExitStack() as stack:
        logs = [
            stack.enter_context(_tracked(name, recipe, out, tell))
            for name in (dict.fromkeys(recipe.trackers) if enabled else ())
        ]

        def log(line: Mapping[str, Any]) -> None:
            values = {f"held_out/{name}": value for name, value in line.get("held_out", {}).items()}
            values |= {
                f"train/{name}": value
                for name, value in line.items()
                if name not in ("step", "held_out")
            }
            values = {name: value for name, value in values.items() if value is not None}
            for send in logs:
                send(values, line["step"])

        yield log


@contextmanager
def _tracked(name: str, recipe: Recipe, out: Path, tell: Callable[[str], None]) -> Iterator[Log]:
    """A tracker whose errors after its start end nothing."""
    with ExitStack() as closing:
        try:
            send = closing.enter_context(TRACKERS[name](recipe, out))
        except LlavaError:
            raise
        except Exception as error:
            raise OptionError(
                f"tracker {name} does not start, {with_place(error)}: leave it out of trackers"
            ) from error
        works = True

        def log(values: Mapping[str, float], step: int) -> None:
            nonlocal works
            try:
                if works:
                    send(values, step)
            except Exception as error:  # noqa: BLE001  of a library, whatever it is
                works = False
                tell(
                    f"tracker {name} gets nothing from step {step:,} on, {with_place(error)}; "
                    "log.jsonl has everything"
                )

        yield log
        try:
            closing.close()
        except Exception as error:  # noqa: BLE001
            tell(f"tracker {name} was not closed, {with_place(error)}")


def _module(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise Unsupported(
            f"{extra} is not installed: pip install 'llava-interleave[{extra}]', or leave it out "
            "of trackers"
        ) from error


def _run_id(out: Path, tracker: str, new: Callable[[], str]) -> str:
    """The id of a run at a tracker, kept in its folder."""
    path = out / f".{tracker}_run"  # `.wandb` is the folder of W&B itself
    if not path.exists():
        path.write_text(new())
    return path.read_text()


@contextmanager
def _tensorboard(_: Recipe, out: Path) -> Iterator[Log]:
    module = _module("torch.utils.tensorboard", "tensorboard")

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    with module.SummaryWriter(str(out / "tensorboard")) as writer:
        yield log


@contextmanager
def _wandb(recipe: Recipe, out: Path) -> Iterator[Log]:
    """WANDB_MODE=offline writes into the folder alone; `wandb sync` sends it later."""
    wandb = _module("wandb", "wandb")
    name = out.absolute().name
    with wandb.init(
        project=recipe.tracker_project,
        name=name,
        id=_run_id(out, "wandb", lambda: secrets.token_hex(4)),
        resume="allow",
        dir=str(out),
        config=recipe.stored(),
    ) as run:
        yield lambda values, step: run.log(dict(values), step=step)


@contextmanager
def _mlflow(recipe: Recipe, out: Path) -> Iterator[Log]:
    """MLFLOW_TRACKING_URI names the server; without it the folder has a database."""
    mlflow = _module("mlflow", "mlflow")
    database = f"sqlite:///{(out / 'mlflow.db').absolute().as_posix()}"
    client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", database))

    def new() -> str:
        found = client.get_experiment_by_name(recipe.tracker_project)
        where = found.experiment_id if found else client.create_experiment(recipe.tracker_project)
        run = client.create_run(where, run_name=out.absolute().name)
        for name, value in recipe.stored().items():
            client.log_param(run.info.run_id, name, value)
        return str(run.info.run_id)

    run_id = _run_id(out, "mlflow", new)
    client.update_run(run_id, "RUNNING")

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            client.log_metric(run_id, name, value, step=step)

    status = "FAILED"
    try:
        yield log
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
