"""Command-line flags: those that several commands share, and those generated from dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import glob
import inspect
import re
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import OptionError
from ..options import Options, unknown

if TYPE_CHECKING:
    from ..processing import Limits

Attach = Annotated[
    list[str] | None,
    typer.Option(
        "--attach",
        "-a",
        metavar="FILE|URL|-",
        help="An image, a video, a folder of images, or '-' for standard input; repeatable.",
    ),
]
View = Annotated[
    list[str] | None,
    typer.Option(
        "--view",
        metavar="NAME=FILE",
        help="A named view of a scene; all --view together are one multi-view input.",
    ),
]
FramesOf = Annotated[
    list[str] | None,
    typer.Option(
        "--frames-of",
        metavar="FOLDER",
        help="A folder whose images are the frames of one video; repeatable.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A checkpoint folder or a Hugging Face name.  [default: the built-in model]",
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit on the Hugging Face hub.")
]
PER_COMPONENT = "per component: int4,head=int4 or int8,tower=float."
_PRECISIONS = (
    "auto, float32, bfloat16, float16, int8, int4, on a CUDA GPU fp8 or nf4; "
    f"int8 and int4 also {PER_COMPONENT}"
)
Precision = Annotated[str, typer.Option(help=_PRECISIONS)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
KvPrecision = Annotated[
    Literal["auto", "int8"],
    typer.Option(help="KV cache: auto, the dtype of the computation, or int8, half of bfloat16."),
]
GpuMemory = Annotated[
    float,
    typer.Option(
        min=0.01,
        max=1.0,
        help="The fraction of a CUDA GPU's memory to use, weights included; several models in "
        "memory share it.",
    ),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="Batch-invariant: the same output whatever else runs in the batch; slower.",
    ),
]
GenerationConfig = Annotated[
    str,
    typer.Option(
        metavar="auto|none|FOLDER",
        help="Whose values replace the defaults of temperature, --top-k, --top-p, --min-p, "
        "--repetition-penalty, --stop and --max-new-tokens: auto is the checkpoint's "
        "generation_config.json; flags always win.",
    ),
]
Limit = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="NAME=VALUE",
        help="Change a limit on media, e.g. image_pixels=150000000; errors name it; repeatable.",
    ),
]
EncoderCacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep image features here, at most 16 GiB: later runs do not compute them again.",
    ),
]
Files = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FILE...]", help="More attachments; a pattern such as *.png too."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

Command = Callable[..., None]
NAMES = {"n": "-n", "stop_ids": "--stop-id"}
"""Fields whose flag has another name than theirs."""


def with_flags(
    parameter: str,
    record: type[Any],
    *,
    tables: Mapping[str, type[Any]] | None = None,
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    defaults: Mapping[str, str] | None = None,
    overrides: bool = False,
) -> Callable[[Command], Command]:
    """Replace a command's `parameter` by one flag per field of the dataclass `record`.

    The command receives a `record`; with `overrides` the used flags alone, as a dict by field name,
    where the field of a table is `table.field` and a boolean also has its `--no-` flag.

    only, without: which fields have a flag. defaults: texts that replace those of the fields.
    """
    flags = [
        _flag(f"{prefix}{field.name}", field, hints[field.name], defaults or {}, overrides)
        for prefix, table in [("", record), *((f"{n}.", t) for n, t in (tables or {}).items())]
        for hints in [typing.get_type_hints(table)]
        for field in dataclasses.fields(table)
        if prefix or (field.name not in without and (only is None or field.name in only))
    ]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p for p in signature if p.name != parameter] + [flag for _, flag in flags]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            values = {key: arguments.pop(flag.name) for key, flag in flags}
            used = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
                if value is not None and value != []
            }
            command(**arguments, **{parameter: used if overrides else record(**used)})

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _flag(
    key: str,
    field: dataclasses.Field[Any],
    hint: Any,
    defaults: Mapping[str, str],
    negatable: bool,
) -> tuple[str, inspect.Parameter]:
    """A field's key and its flag, which is None where it is not used."""
    name = key.replace(".", "_")
    flag = NAMES.get(key, "--" + name.replace("_", "-"))
    default = defaults.get(key, field.metadata.get("default"))
    if default is None:
        default = _default_text(field.default)
    sentence = field.metadata["help"] + (f"  [default: {default}]" if default else "")
    if hint == bool | None or (hint is bool and (negatable or field.default is True)):
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    option = typer.Option(flag, help=sentence)
    annotation = Annotated[_flag_type(hint) | None, option]  # type: ignore[valid-type]
    kind = inspect.Parameter.KEYWORD_ONLY
    return key, inspect.Parameter(name, kind, default=None, annotation=annotation)


def _default_text(value: Any) -> str:
    """Empty for None, False and an empty tuple."""
    if value is None or value is False:
        return ""
    if isinstance(value, tuple):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flag_type(hint: Any) -> Any:
    """The type of a field's flag: several strings or ids are a repeatable list."""
    if "tuple" not in str(hint):
        return hint
    return list[int] if hint == tuple[int, ...] else list[str]


with_options = with_flags("given", Options, without=("logit_bias",), overrides=True)
"""Gives a command that takes `given: dict[str, Any]` one flag per field."""


def question_and_files(words: Sequence[str]) -> tuple[str, list[str]]:
    """The question among positional arguments, and the files.

    The question is the first word that is not a file, so that a shell may expand `-a *.png`.
    """
    number = next((i for i, word in enumerate(words) if not _is_media(word)), None)
    if number is None:
        raise OptionError(
            f"there is no question next to the files {', '.join(words[:3])}: "
            "add one in quotes, or '-' for standard input"
        )
    return words[number], [word for i, word in enumerate(words) if i != number]


def _is_media(word: str) -> bool:
    if word.startswith(("http://", "https://", "file:", "data:")):
        return True
    try:
        return Path(word).expanduser().exists()
    except OSError:  # a question that is too long for a file's name
        return False


def expand(words: Sequence[str]) -> list[str]:
    """File names with `~` and patterns such as `*.png` expanded, sorted as a shell does.

    Raises `OptionError` for a pattern without a match.
    """
    files: list[str] = []
    for word in words:
        if word == "-" or word.startswith(("http://", "https://", "file:", "data:")):
            files.append(word)
            continue
        path = str(Path(word).expanduser()) if word.startswith("~") else word
        if not glob.has_magic(path) or Path(path).exists():
            files.append(path)
        elif matches := sorted(glob.glob(path, recursive=True)):  # noqa: PTH207  absolute ones too
            files += matches
        else:
            raise OptionError(f"no file matches {word}")
    return files


def attachments(
    words: Sequence[str] | None, views: list[str] | None, frames_of: list[str] | None = None
) -> list[object]:
    """The media of -a, --frames-of and --view; '-' is read from standard input.

    Raises `OptionError` for a view without a name, and as `expand`.
    """
    sources: list[object] = [
        sys.stdin.buffer.read() if word == "-" else word for word in expand(words or [])
    ]
    sources += [{"type": "video", "path": folder} for folder in frames_of or []]
    if views:
        pairs = [view.partition("=") for view in views]
        if not all(name and equals and file for name, equals, file in pairs):
            raise OptionError("--view takes NAME=FILE, for example --view front=front.png")
        sources.append(
            {"type": "views", "views": [{"name": name, "image": file} for name, _, file in pairs]}
        )
    return sources


def limits(words: Sequence[str]) -> Limits:
    """The limits with the changes of --limit. Raises `OptionError`."""
    from ..processing import Limits

    defaults = Limits()
    names = [f.name for f in dataclasses.fields(Limits) if type(getattr(defaults, f.name)) in KINDS]
    changes: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if name not in names:
            raise unknown("limit", name, names)
        kind = type(getattr(defaults, name))
        try:
            changes[name] = KINDS[kind](text)
        except (ValueError, KeyError) as error:
            raise OptionError(
                f"--limit {name} takes {KIND_NAMES[kind]}, not {text if equals else 'nothing'!r}"
            ) from error
    return dataclasses.replace(defaults, **changes)


KINDS: dict[type, Callable[[str], Any]] = {
    int: lambda text: int(float(text)) if "e" in text.lower() else int(text),
    float: float,
    bool: {"true": True, "false": False}.__getitem__,
}
KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


def describe(error: Exception) -> str:
    """An error's message, and for a limit on media the flag that changes it."""
    name = re.search(r"\bLimits\.(\w+)", str(error))
    return str(error) + (f"; --limit {name[1]}=VALUE changes it" if name else "")
