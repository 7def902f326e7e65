"""`llava convert` and `llava verify`: other checkpoint layouts, parity with transformers."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from .. import __version__
from ..errors import OptionError
from ..options import unknown
from . import flags, terminal

if TYPE_CHECKING:
    from ..compose.gguf_files import GgufType

Layout = Literal[
    "hub", "original", "transformers-4.52", "transformers-5", "transformers-5.23", "gguf"
]
DECODER = "decoder.gguf"
GGUF_TYPES = ("f16", "bf16", "q8_0", "q4_0")


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)
    app.command("verify")(verify)


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A checkpoint folder, a Hugging Face name or builtin."),
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help="The folder to write; it must not exist or be empty."),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; with --layout gguf f16, bf16, q8_0 or q4_0.  "
            "[default: as stored; of gguf f16]"
        ),
    ] = None,
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="Naming scheme of the tensors; gguf: decoder.gguf and mmproj.gguf for llama.cpp.  "
            "[default: hub; original for LLaVA-Video]"
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Merge this LoRA adapter: a folder in PEFT's format or a Hugging Face name."
        ),
    ] = None,
    revision: flags.Revision = None,
) -> None:
    """Write a checkpoint in another layout or dtype, with its tokenizer and processor files."""
    form = dtype or "f16"
    if layout == "gguf" and form not in GGUF_TYPES:
        raise unknown("dtype of --layout gguf", form, GGUF_TYPES)
    with terminal.spinner(f"converting {source}"):
        import torch

        from ..chat import locate, named_dtype
        from ..checkpoints import load, read_adapter, resolve, save
        from ..compose.gguf_files import write_gguf
        from ..lora import merge
        from ..processing.processor_files import files_for_transformers

        folder = locate(source, revision)
        target_dtype = named_dtype(dtype) if dtype and layout != "gguf" else None
        network = load(folder, dtype=target_dtype)
        if adapter:
            merge(network, read_adapter(resolve(adapter), network, dtype=torch.float32))
        completed = (
            nullcontext(folder)
            if layout == "original"
            else files_for_transformers(folder, network.config)
        )
        with completed as files:
            if layout == "gguf":
                write_gguf(network, target, Path(files), cast("GgufType", form))
            else:
                save(network, target, processor_from=files, dtype=target_dtype, layout=layout)
    print(target)


def verify(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder or a Hugging Face name.  [default: the built-in model]"),
    ] = None,
    revision: flags.Revision = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Compare with this LoRA adapter applied: a folder or a Hugging Face name."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The checkpoint to compare with: of quantized weights and GGUF files their "
            "source.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Number of greedy tokens compared.")] = 32,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Also run ablations: change preset, image geometry, precision or layer one at a "
            "time and report the effect.",
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML report.")] = None,
    as_json: flags.Json = False,
) -> None:
    """Compare ids, pixels, layers, logits and greedy tokens with transformers, in float32.

    Exit code 1 if they differ. For LLaVA-OneVision, answers published for its checkpoints are
    shown to compare with. Quantized weights are compared with their dequantized values
    and equally rounded inputs, or with --against. A folder of `convert --layout gguf` is computed
    by llama.cpp (llama-cpp-python) and compared with --against.
    """
    if model and (Path(model) / DECODER).is_file():
        if adapter or ablate or html:
            raise OptionError("GGUF files are compared without --adapter, --ablate and --html")
        _verify_gguf(Path(model), against, revision, tokens, as_json)
        return
    with terminal.spinner("comparing with transformers"):
        from .. import verify as parity
        from ..chat import locate
        from ..checkpoints import read_json
        from ..verify import published, report

        cases = parity.verify(
            model, revision=revision, adapter=adapter, against=against, tokens=tokens
        )
    results: list[parity.AblationResult] = []
    if ablate:
        with terminal.spinner("running ablations") as progress:
            results = parity.ablate(
                model, revision=revision, adapter=adapter, tokens=tokens, progress=progress
            )
    versions = {
        "llava-interleave": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    options = {name: value for name, value in (("adapter", adapter), ("against", against)) if value}
    config = read_json(locate(model, revision) / "config.json")
    answers = published.published_answers(model or "", config)
    about = {"model": model or "the built-in model", **options, **versions}
    if html:
        report.write(html, f"llava verify: {about['model']}", cases, results, about)
        terminal.wrote(html)
    if as_json:
        print(
            json.dumps(
                about
                | {
                    "cases": [case.to_dict() for case in cases],
                    "ablations": [dataclasses.asdict(result) for result in results],
                    "published": [
                        dict(zip(published.COLUMNS, row, strict=True)) for row in answers
                    ],
                }
            )
        )
    else:
        terminal.table(
            f"candidate against {cases[0].tolerance.reference}",
            list(report.CASES),
            report.case_rows(cases),
        )
        terminal.table(
            "each layer, for the prompt in which it differs most",
            list(report.LAYERS),
            report.layer_rows(cases),
        )
        if results:
            terminal.table(
                f"ablations; baseline: {parity.BASELINE}",
                list(report.ABLATIONS),
                report.ablation_rows(results),
            )
        if answers:
            terminal.table(
                f"published answers to {published.RADAR}", list(published.COLUMNS), answers
            )
    if not all(case.passed for case in cases):
        raise typer.Exit(1)


def _verify_gguf(
    folder: Path, against: str | None, revision: str | None, tokens: int, as_json: bool
) -> None:
    with terminal.spinner("comparing with llama.cpp"):
        from ..verify import llama_cpp

        cases = llama_cpp.verify_gguf(folder, against, revision, tokens)
    if as_json:
        print(json.dumps({"model": str(folder), "cases": [dataclasses.asdict(c) for c in cases]}))
    else:
        rows = [
            [
                case.name,
                "yes" if case.same_ids else "no",
                "" if case.cosine is None else f"{case.cosine:.7f}",
                f"{case.divergence:.2g}",
                "" if case.own_divergence is None else f"{case.own_divergence:.2g}",
                f"{case.matching} of {case.compared}",
            ]
            for case in cases
        ]
        columns = ["", "same ids", "cosine of features", "nats", "nats, its own images", "tokens"]
        terminal.table(f"{folder} in llama.cpp", columns, rows)
    if not all(case.passed for case in cases):
        raise typer.Exit(1)
