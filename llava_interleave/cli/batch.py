"""`llava batch`: the samples of a file or a folder, answered into a file."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
from ..options import Options
from . import terminal


def register(app: typer.Typer) -> None:
    app.command("batch")(terminal.with_options(batch))


def batch(
    source: Annotated[
        Path,
        typer.Argument(
            help="Samples: .jsonl (also OpenAI's batch format), .csv, .parquet, WebDataset's .tar, or a folder."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="The answers, .jsonl: a line a sample, in their order; it appears when all are there."
        ),
    ],
    question: Annotated[
        str | None, typer.Option(help="Asked of samples that have no question of their own.")
    ] = None,
    together: Annotated[
        int, typer.Option("--batch", min=1, help="Samples that are computed together.")
    ] = 32,
    model: terminal.ModelName = None,
    revision: terminal.Revision = None,
    precision: terminal.Precision = "auto",
    device: terminal.Device = "auto",
    deterministic: terminal.Deterministic = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Answer on a Ray cluster: auto (this machine's), HOST:PORT, or local. Its machines must have the samples and "
            "the model.",
        ),
    ] = None,
    ray_cpus: Annotated[
        int,
        typer.Option(
            min=1,
            help="CPUs of each model on the cluster; there is one a GPU, else one a CPU slot.",
        ),
    ] = 1,
    *,
    options: Options,
) -> None:
    """Answer many samples. Called again after it was stopped, it goes on; a sample that fails has its error in its line."""
    if out.suffix != ".jsonl":
        raise OptionError(f"the answers are JSON lines: name {out} .jsonl")
    if options.n != 1 or options.logprobs is not None:
        raise OptionError("batch writes one answer to each sample, without log-probabilities")
    from ..batch import Source, ray_cluster, run
    from .local_model import ClusterWorker, LazyModel, replies

    samples = Source(source, question)
    about = {"options": dataclasses.asdict(options)}
    started = time.monotonic()
    if ray:
        with terminal.counting("answering") as progress:
            options = options.but({"adapter": absolute(options.adapter)})
            worker = ClusterWorker(
                absolute(model), revision, precision, device, options.adapter, deterministic
            )
            count, failed = ray_cluster.run(
                samples,
                out,
                worker,
                options,
                about,
                address=ray,
                cpus=ray_cpus,
                batch=together,
                say=progress,
            )
    else:
        named = LazyModel(model, revision, precision, device, options.adapter, deterministic)
        answer = replies(named.ready(options).batch)
        with terminal.counting("answering") as progress:
            count, failed = run(
                samples,
                out,
                answer,
                options,
                {**named.about, **about},
                batch=together,
                say=progress,
            )
    seconds = time.monotonic() - started
    print(f"{out}: {count} samples, {failed} with an error, in {seconds:.0f} s", file=sys.stderr)


def absolute(name: str | None) -> str | None:
    """A folder as processes name it that began in other ones; a name on the hub, or none, as it is."""
    return (
        str(Path(name).expanduser().absolute())
        if name and Path(name).expanduser().is_dir()
        else name
    )
