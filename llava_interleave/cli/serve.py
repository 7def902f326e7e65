"""`llava serve`: an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError, Unsupported
from ..server.settings import ReplicaSpec, Settings
from . import terminal
from .batch import absolute

if TYPE_CHECKING:
    from fastapi import FastAPI


def register(app: typer.Typer) -> None:
    app.command("serve")(terminal.with_flags(Settings, "settings")(serve))


def serve(
    model: terminal.ModelName = None,
    revision: terminal.Revision = None,
    precision: terminal.Precision = "auto",
    device: terminal.Device = "auto",
    deterministic: terminal.Deterministic = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help="Serve this adapter as a model of its own; several times."
        ),
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error; the log goes to stderr.")
    ] = "info",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Answer with replicas of the model on a Ray cluster: auto (this machine's), HOST:PORT, or local. Its machines "
            "must have the model.",
        ),
    ] = None,
    ray_cpus: Annotated[
        int | None, typer.Option(min=1, help="CPUs of each replica on the cluster; without it 1.")
    ] = None,
    ray_replicas: Annotated[
        str | None,
        typer.Option(
            metavar="FEWEST[:MOST]",
            help="Replicas on the cluster, as many as there is work for; without it from 1 to what fits.",
        ),
    ] = None,
    *,
    settings: Settings,
) -> None:
    """Serve a model over HTTP as OpenAI's API does, to this machine alone unless --host and --api-keys say more."""
    named = [(name, folder) for name, _, folder in (word.partition("=") for word in adapter or ())]
    for name, folder in named:
        if not name or not folder:
            raise typer.BadParameter(
                f"an adapter is given as NAME=FOLDER, not {name or '='}{folder}"
            )
    if not isinstance(level := logging.getLevelName(log_level.upper()), int):
        raise typer.BadParameter(f"{log_level!r} is not one of debug, info, warning, error")
    counts = None if ray_replicas is None else _counts(ray_replicas)
    if ray is None and (ray_cpus or counts):
        raise typer.BadParameter(
            "--ray-cpus and --ray-replicas are of a cluster: name it with --ray"
        )
    if ray and device.startswith("cuda:"):
        raise OptionError(
            f"a replica has the GPU that Ray gives it, so --device {device} cannot be kept; say cuda, or nothing"
        )
    with contextlib.ExitStack() as cluster:
        with keeping_all():
            with terminal.busy("starting"):
                try:
                    from ..server.run import Server, log_to_stderr, one_heap
                except ModuleNotFoundError as error:
                    raise Unsupported(
                        f"{error.name} is missing; serving needs: pip install 'llava-interleave[serve]'"
                    ) from error
                from ..server.app import create_app
                from ..server.middleware import ApiKeys
            if settings.api_keys is not None:
                ApiKeys.read(
                    settings.api_keys
                )  # a mistake in it is told before the model is loaded
            log_to_stderr(level)
            one_heap()
            if ray:
                folders = tuple((name, absolute(folder) or folder) for name, folder in named)
                everywhere = ReplicaSpec(
                    absolute(model), revision, precision, device, deterministic, folders, level
                )
                app = cluster.enter_context(
                    _deployed(everywhere, settings, ray, ray_cpus or 1, counts)
                )
            else:
                bot = terminal.load(model, revision, precision, device, deterministic=deterministic)
                for name, folder in named:
                    bot.add_adapter(name, folder)
                app = create_app(bot, settings)
            server = Server(app, settings)
        server.run()


def _counts(words: str) -> tuple[int, int]:
    """The fewest and the most of "2:8"; of "2" both are 2."""
    said = re.fullmatch(r"([1-9][0-9]*)(?::([1-9][0-9]*))?", words)
    if said is None or int(said[1]) > int(said[2] or said[1]):
        raise typer.BadParameter(
            f"--ray-replicas is a number, or the fewest and the most as in 2:8, not {words!r}"
        )
    return int(said[1]), int(said[2] or said[1])


@contextlib.contextmanager
def _deployed(
    model: ReplicaSpec,
    settings: Settings,
    address: str,
    cpus: int,
    replicas: tuple[int, int] | None,
) -> Iterator[FastAPI]:
    with contextlib.ExitStack() as running:
        with terminal.busy("starting replicas"):
            try:
                from ..server.ray_gateway import deployed
            except ModuleNotFoundError as error:
                raise Unsupported(
                    f"{error.name} is missing; --ray needs: pip install 'llava-interleave[serve,ray]'"
                ) from error
            app = running.enter_context(
                deployed(model, settings, address=address, cpus=cpus, replicas=replicas)
            )
        yield app


@contextlib.contextmanager
def keeping_all() -> Iterator[None]:
    """What is made meanwhile stays: it is not searched for garbage, now (a seventh of the time of starting) or ever."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
