"""`llava batch`: batch inference on the samples of a file or a folder."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from ..options import Options
from . import flags, terminal
from .local_model import (
    BUILTIN_MODEL,
    ClusterWorker,
    LazyModel,
    ModelFlags,
    about_options,
    replies,
    with_model,
)

if TYPE_CHECKING:
    from ..batch import Source

SHOWN = 10
"""Errors and skipped files that are printed."""


def register(app: typer.Typer) -> None:
    model = with_model(
        "kv_precision", "gpu_memory", "batch_invariant", "limits", "generation_config"
    )
    app.command("batch")(flags.with_options(model(batch)))


def batch(
    source: Annotated[
        Path,
        typer.Argument(
            help="Samples: .jsonl (also OpenAI's batch format), .csv, .tsv, .parquet, a WebDataset "
            ".tar, or a folder."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="The answers, .jsonl: one line per sample, in order; written when all are done."
        ),
    ],
    question: Annotated[
        str | None, typer.Option(help="The question of samples that have none.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 32,
    model: ModelFlags = BUILTIN_MODEL,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run on a Ray cluster: auto (this machine's), HOST:PORT, or local. Its machines "
            "need the samples and the model.",
        ),
    ] = None,
    ray_cpus: Annotated[
        int,
        typer.Option(
            min=1,
            help="CPUs of each replica on the cluster; one replica per GPU, else per CPU slot.",
        ),
    ] = 1,
    *,
    given: dict[str, Any],
) -> None:
    """Answer many samples. An interrupted run resumes; a failed sample's line has its error.

    Exit code 1 if a sample failed.
    """
    if out.suffix != ".jsonl":
        raise OptionError(
            f"the answers are JSON lines, so the output must end in .jsonl, not {out.name!r}"
        )
    options = Options(**given)
    if options.n != 1 or options.logprobs is not None or options.cite:
        raise OptionError(
            "batch writes one answer per sample, without log-probabilities and citations: "
            "leave out -n, --logprobs and --cite"
        )
    from ..batch import Source, ray_cluster, run

    model = model.with_adapter(options.adapter)
    samples = Source(source, question)
    started = time.monotonic()
    if ray:
        with terminal.resumable(out), terminal.progress_bar("answering") as progress:
            adapter = absolute(options.adapter)
            everywhere = dataclasses.replace(
                model,
                name=absolute(model.name),
                adapter=adapter,
                generation_config=absolute(model.generation_config) or "",
            )
            worker = ClusterWorker(everywhere, tuple({**given, "adapter": adapter}.items()))
            count, failed = ray_cluster.run(
                samples,
                out,
                worker,
                address=ray,
                cpus=ray_cpus,
                batch_size=batch_size,
                progress=progress,
            )
    else:
        local = LazyModel(model)
        options = local.options(given)
        answer = replies(local.ready(options).batch)
        with terminal.resumable(out), terminal.progress_bar("answering") as progress:
            count, failed = run(
                samples,
                out,
                answer,
                options,
                {**local.about, **about_options(local.generation_config, options)},
                batch_size=batch_size,
                progress=progress,
            )
    seconds = time.monotonic() - started
    print(f"{out}: {count} samples, {failed} with an error, in {seconds:.0f} s", file=sys.stderr)
    report_skipped(samples, out)
    if failed:
        report_failed(out, failed)
        raise typer.Exit(1)


def report_failed(out: Path, failed: int) -> None:
    """Print the first errors of an output with `failed` failed samples."""
    for sample, error in itertools.islice(errors(out), SHOWN):
        print(f"  {sample}: {error}", file=sys.stderr)
    if failed > SHOWN:
        print(f"  and {failed - SHOWN} more; each line has its error", file=sys.stderr)


def report_skipped(samples: Source, out: Path) -> None:
    """Name the files that are not samples; all of them in a file next to the output if many."""
    if not samples.skipped:
        return
    print(f"{len(samples.skipped)} files are not samples:", file=sys.stderr)
    for name, reason in samples.skipped[:SHOWN]:
        print(f"  {name}: {reason}", file=sys.stderr)
    if len(samples.skipped) > SHOWN:
        log = out.with_suffix(".skipped.txt")
        text = "".join(f"{name}: {reason}\n" for name, reason in samples.skipped)
        log.write_text(text, "utf-8", "backslashreplace")
        print(f"  and {len(samples.skipped) - SHOWN} more, see {log}", file=sys.stderr)


def errors(out: Path) -> Iterator[tuple[str, str]]:
    """Ids and errors of the failed samples in an output."""
    with out.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if "response" not in row:
                if "error" in row:
                    yield row["id"], row["error"]
            elif row["response"]["status_code"] != 200:
                yield row["custom_id"], row["response"]["body"]["error"]["message"]


def absolute(name: str | None) -> str | None:
    """An absolute path for a folder, so that other processes find it; other names unchanged."""
    return (
        str(Path(name).expanduser().absolute())
        if name and Path(name).expanduser().is_dir()
        else name
    )
