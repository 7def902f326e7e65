"""`llava quantize`: a checkpoint with weights of 4 or 8 bits, packed as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import terminal


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
        str, typer.Option(help=f"What the weights become: int4 or int8, or with {terminal.APART}")
    ] = "int4",
    revision: terminal.Revision = None,
) -> None:
    """Write a checkpoint with quantized weights: a CPU loads it at once, in no more memory than its bytes. CUDA GPUs read it."""
    with terminal.busy(f"quantizing {source}") as progress:
        from ..checkpoints import load, resolve, save
        from ..errors import OptionError
        from ..placement import pick_precision
        from ..quantization.precision import parse_precision

        if not parse_precision(precision):
            raise OptionError(
                f"{precision!r} is no precision to store: int4 or int8, or with {terminal.APART}"
            )
        folder = resolve(source, revision)
        dtype, bits = pick_precision(precision, folder, "cpu")
        save(
            load(folder, dtype=dtype, precision=bits, progress=progress),
            target,
            processor_from=folder,
        )
    print(target)
