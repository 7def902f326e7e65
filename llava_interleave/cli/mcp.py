"""`llava mcp`: the model as tools of an assistant that speaks the Model Context Protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError, Unsupported
from . import flags


def register(app: typer.Typer) -> None:
    app.command("mcp")(mcp)


def mcp(
    model: flags.ModelName = None,
    revision: flags.Revision = None,
    precision: flags.Precision = "auto",
    device: flags.Device = "auto",
    root: Annotated[
        Path, typer.Option(help="Only files below this folder are read; relative paths begin here.")
    ] = Path(),
) -> None:
    """Serve the tools ask, compare, attribute and count_tokens over standard input and output.

    Name this command in the configuration of an MCP client: {"command": "llava", "args": ["mcp"]}.
    """
    if not root.is_dir():
        raise OptionError(f"--root {root} is not a folder")
    try:
        from ..mcp_server import create_server
    except ImportError as error:
        raise Unsupported(
            f"llava mcp needs the mcp package ({error}); pip install 'llava-interleave[mcp]'"
        ) from error
    from ..chat import load
    from ..processing import Limits

    bot = load(
        model,
        revision=revision,
        precision=precision,
        device=device,
        limits=Limits(media_root=root.resolve()),
    )
    create_server(bot, root).run()
