"""`llava quantize`: an int4 or int8 checkpoint, packed as the kernels read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import flags, terminal


def register(app: typer.Typer) -> None:
    app.command("quantize")(quantize)


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint folder or a Hugging Face name.")
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help="The folder to write; it must not exist or be empty."),
    ],
    precision: Annotated[
        str, typer.Option(help=f"int4 or int8, or {flags.PER_COMPONENT}")
    ] = "int4",
    revision: flags.Revision = None,
) -> None:
    """Write an int4/int8 checkpoint.

    A CPU memory-maps it (instant load, no extra memory); CUDA can load it too.
    """
    with terminal.spinner(f"quantizing {source}") as progress:
        from ..checkpoints import Checkpoint, load, resolve, save
        from ..errors import OptionError
        from ..placement import pick_precision
        from ..quantization.precision import parse_precision

        if not parse_precision(precision):
            raise OptionError(
                f"cannot store precision {precision!r}: use int4 or int8, or {flags.PER_COMPONENT}"
            )
        checkpoint = Checkpoint.open(resolve(source, revision))
        dtype, bits = pick_precision(precision, checkpoint, "cpu")
        save(
            load(checkpoint, dtype=dtype, precision=bits, progress=progress),
            target,
            processor_from=checkpoint.folder,
        )
    print(target)
