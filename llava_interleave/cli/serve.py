"""`llava serve`: an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from typing import Annotated

import typer

from ..errors import Unsupported
from ..server.settings import Settings
from . import show


def register(app: typer.Typer) -> None:
    app.command("serve")(show.with_flags(Settings, "settings")(serve))


def serve(
    model: show.ModelName = None,
    revision: show.Revision = None,
    precision: show.Precision = "auto",
    device: show.Device = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Serve this adapter as a model of its own; several times."),
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error; the log goes to stderr.")] = "info",
    *,
    settings: Settings,
) -> None:
    """Serve a model over HTTP as OpenAI's API does, to this machine alone unless --host and --api-keys say more."""
    named = [(name, folder) for name, _, folder in (word.partition("=") for word in adapter or ())]
    for name, folder in named:
        if not name or not folder:
            raise typer.BadParameter(f"an adapter is given as NAME=FOLDER, not {name or '='}{folder}")
    if not isinstance(level := logging.getLevelName(log_level.upper()), int):
        raise typer.BadParameter(f"{log_level!r} is not one of debug, info, warning, error")
    with keeping_all():
        with show.busy("starting"):
            try:
                from ..server.run import Server, one_heap
            except ModuleNotFoundError as error:
                raise Unsupported(f"{error.name} is missing; serving needs: pip install 'llava-interleave[serve]'") from error
            from ..server.app import create_app
            from ..server.guard import Keys
        if settings.api_keys is not None:
            Keys.read(settings.api_keys)  # a mistake in it is told before the model is loaded
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        logging.getLogger("llava_interleave").setLevel(level)
        one_heap()
        bot = show.load(model, revision, precision, device)
        for name, folder in named:
            bot.add_adapter(name, folder)
        server = Server(create_app(bot, settings), settings)
    server.run()


@contextlib.contextmanager
def keeping_all() -> Iterator[None]:
    """What is made meanwhile stays: it is not searched for garbage, now (a seventh of the time of starting) or ever."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
