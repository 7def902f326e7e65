"""`llava serve`: an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError, Unsupported
from ..server.settings import ReplicaSpec, Settings
from . import flags, terminal
from .batch import absolute
from .local_model import ModelFlags

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..server.models import ModelSpec


def register(app: typer.Typer) -> None:
    app.command("serve")(flags.with_flags("settings", Settings)(serve))


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="[NAME=]MODEL",
            help="A checkpoint folder or a Hugging Face name; several with NAME= each: a request's "
            "`model` chooses one, and it is loaded then.  [default: the built-in model]",
        ),
    ] = None,
    revision: flags.Revision = None,
    precision: flags.Precision = "auto",
    device: flags.Device = "auto",
    kv_precision: flags.KvPrecision = "auto",
    gpu_memory: flags.GpuMemory = 0.9,
    batch_invariant: flags.BatchInvariant = False,
    generation_config: flags.GenerationConfig = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help="Serve this LoRA adapter as another model; repeatable."
        ),
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error; logs go to stderr.")
    ] = "info",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run replicas on a Ray cluster: auto (this machine's), HOST:PORT, or local. "
            "Its machines need the model.",
        ),
    ] = None,
    ray_cpus: Annotated[
        int | None, typer.Option(min=1, help="CPUs per replica on the cluster.  [default: 1]")
    ] = None,
    ray_replicas: Annotated[
        str | None,
        typer.Option(
            metavar="MIN[:MAX]",
            help="Replicas on the cluster, scaled with the load.  [default: 1 to what fits]",
        ),
    ] = None,
    *,
    settings: Settings,
) -> None:
    """Start an OpenAI-compatible server.

    It listens on localhost only; set --host and --api-keys to expose it.
    """
    adapters = [
        (name, folder) for name, _, folder in (word.partition("=") for word in adapter or ())
    ]
    for name, folder in adapters:
        if not name or not folder:
            raise typer.BadParameter(f"--adapter takes NAME=FOLDER, not {name or '='}{folder}")
    if not isinstance(level := logging.getLevelName(log_level.upper()), int):
        raise typer.BadParameter(f"{log_level!r} is not one of debug, info, warning, error")
    sources = _sources(model or [], settings.name)
    if len(sources) > 1:
        of_one = {"--adapter": adapters, "--revision": revision, "--name": settings.name}
        if used := ", ".join(flag for flag, value in of_one.items() if value):
            raise OptionError(f"{used} is for a single --model, not for {len(sources)}")
        if ray:
            raise OptionError(
                f"--ray serves a single --model, not {len(sources)}: start a server for each, with "
                "a --port of its own"
            )
    ((served_name, source), *_) = sources.items()
    if len(sources) == 1:
        settings = dataclasses.replace(settings, name=served_name)
    replicas = None if ray_replicas is None else _replica_range(ray_replicas)
    if ray is None and (ray_cpus or replicas):
        raise typer.BadParameter("--ray-cpus and --ray-replicas need a cluster: name it with --ray")
    if ray and device.startswith("cuda:"):
        raise OptionError(
            f"Ray assigns a GPU to each replica: use --device cuda instead of {device}"
        )
    with contextlib.ExitStack() as cluster:
        with freeze_garbage_collector():
            with terminal.starting():
                try:
                    from ..server.process import tune_process
                    from ..server.run import Server, check_port, log_to_stderr
                except ModuleNotFoundError as error:
                    raise Unsupported(
                        f"{error.name} is missing: pip install 'llava-interleave[serve]'"
                    ) from error
                from ..server.api_keys import ApiKeys
                from ..server.app import create_app
            log_to_stderr(level)
            if settings.api_keys is not None:
                ApiKeys.read(settings.api_keys)  # fail before the model is loaded
            check_port(settings)
            tune_process()
            if ray:
                folders = tuple((name, absolute(folder) or folder) for name, folder in adapters)
                spec = ReplicaSpec(
                    absolute(source),
                    revision,
                    precision,
                    device,
                    batch_invariant,
                    folders,
                    absolute(generation_config) or "",
                    level,
                    kv_precision,
                    gpu_memory,
                )
                app = cluster.enter_context(_deployed(spec, settings, ray, ray_cpus or 1, replicas))
            else:
                models = {
                    called: ModelFlags(
                        where,
                        revision,
                        precision,
                        device,
                        batch_invariant=batch_invariant,
                        generation_config=generation_config,
                        kv_precision=kv_precision,
                        gpu_memory=gpu_memory / min(len(sources), settings.max_loaded_models),
                    )
                    for called, where in sources.items()
                }
                if len(models) > 1:
                    specs = {str(called): _spec(str(called), one) for called, one in models.items()}
                    app = create_app(specs, settings)
                else:
                    bot = models[served_name].load()
                    for name, folder in adapters:
                        bot.add_adapter(name, folder)
                    app = create_app(bot, settings)
            server = Server(app, settings)
        server.run()


def _sources(words: Sequence[str], name: str | None) -> dict[str | None, str | None]:
    """The models of --model by name; a name is None where it is left to the folder."""
    sources: dict[str | None, str | None] = {}
    for word in words:
        called, equals, source = word.partition("=")
        if not equals or Path(word).exists():
            called, source = "", word
        elif not re.fullmatch(r"[\w.:/-]{1,128}", called) or not source:
            raise OptionError(f"--model takes MODEL or NAME=MODEL, not {word}")
        key = called or (Path(source).name if len(words) > 1 else name)
        if key in sources:
            raise OptionError(f"two models are called {key}: give each a name, --model NAME={word}")
        sources[key] = source
    return sources or {name: None}


def _spec(name: str, model: ModelFlags) -> ModelSpec:
    """A model that is loaded later; what is known before comes from its settings alone."""
    from .. import generation_config
    from ..chat import locate
    from ..processing import Processor
    from ..server.models import ModelSpec
    from ..server.service import model_card

    folder = locate(model.name, model.revision, tensors=False)
    defaults = generation_config.read(folder, model.generation_config)
    card = model_card(name, None, Processor.from_folder(folder), defaults, folder)
    return ModelSpec(model.load, card)


def _replica_range(text: str) -> tuple[int, int]:
    """(2, 8) of "2:8" and (2, 2) of "2"."""
    match = re.fullmatch(r"([1-9][0-9]*)(?::([1-9][0-9]*))?", text)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise typer.BadParameter(
            f"--ray-replicas is a number, or minimum and maximum as in 2:8, not {text!r}"
        )
    return int(match[1]), int(match[2] or match[1])


@contextlib.contextmanager
def _deployed(
    model: ReplicaSpec,
    settings: Settings,
    address: str,
    cpus: int,
    replicas: tuple[int, int] | None,
) -> Iterator[FastAPI]:
    with contextlib.ExitStack() as running:
        with terminal.spinner("starting replicas"):
            try:
                from ..server.ray.gateway import deploy
            except ModuleNotFoundError as error:
                raise Unsupported(
                    f"{error.name} is missing: pip install 'llava-interleave[serve,ray]'"
                ) from error
            app = running.enter_context(
                deploy(model, settings, address=address, cpus=cpus, replicas=replicas)
            )
        yield app


@contextlib.contextmanager
def freeze_garbage_collector() -> Iterator[None]:
    """Exclude all objects made inside from garbage collection: a seventh of the start-up time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
