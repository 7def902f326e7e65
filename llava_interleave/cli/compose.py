"""`llava compose`: a LLaVA checkpoint from a tower and a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import terminal


def register(app: typer.Typer) -> None:
    app.command("compose")(compose)


def compose(
    tower: Annotated[
        str,
        typer.Option(
            help="SigLIP: a folder or a Hugging Face name; a .pth file of an EfficientNet-Lite; or "
            "the mmproj .gguf file of a LLaVA, with its projector.",
            metavar="MODEL",
        ),
    ],
    decoder: Annotated[
        str,
        typer.Option(
            help="Qwen1.5, Qwen2, Qwen2.5, or Llama without biases (SmolLM2): a folder, a Hugging "
            "Face name, or a .gguf file.",
            metavar="MODEL",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The folder to write; it must not exist or be empty."),
    ],
    tower_layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers of the tower that are used.  [default: all but the last]"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder of the tokenizer, where a .gguf file has an unsupported one."),
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(
            help="JSON list with the names of the tower's classes; the projector begins as its "
            "classifier.",
            metavar="FILE",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.  [default: as the decoder]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the projector and of new embeddings.")] = 0,
) -> None:
    """Compose a LLaVA checkpoint from a tower and a language model.

    The projector between them is new: train it with `llava train -r align -m OUT`. Of an mmproj
    file it is the file's, and the model is complete.
    """
    with terminal.spinner(f"composing {out}"):
        from ..chat import named_dtype
        from ..compose import compose as write

        write(
            tower,
            decoder,
            out,
            tower_layers=tower_layers,
            tokenizer=tokenizer,
            class_names=class_names,
            dtype=named_dtype(dtype) if dtype else None,
            seed=seed,
        )
    print(out)
