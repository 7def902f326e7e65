"""`llava table` and `llava find`: the same questions about each of many images."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import reports
from ..errors import DataError, MediaError, OptionError, Unsupported
from ..journal import Journal
from ..options import Options
from . import flags, terminal
from .batch import SHOWN
from .local_model import BUILTIN_MODEL, LazyModel, ModelFlags, with_model

if TYPE_CHECKING:
    from ..chat.columns import Column
    from ..chat.table import Cell, Row

SUFFIXES = (".csv", ".jsonl", ".parquet")
ALLOWED_WARNING = 0.5
"""A cell below this share of probability on allowed answers is reported."""
THUMBNAIL = 320

Images = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE...", help="Images, videos, folders of them, or patterns."),
]
CellsFile = Annotated[
    Path | None,
    typer.Option(
        "--cells",
        metavar="FILE",
        help="Keep the computed cells here: later runs compute only new images and columns.",
    ),
]


SAMPLING = (
    *("logit_bias", "n", "temperature", "top_k", "top_p", "min_p", "seed"),
    *("stop", "stop_ids", "ignore_eos", "logprobs", "cite", "orders"),
)
"""Options without a flag here: a cell is one greedy answer."""


def register(app: typer.Typer) -> None:
    with_options = flags.with_flags("given", Options, without=SAMPLING, overrides=True)
    model = with_model("batch_invariant", "limits", "encoder_cache_dir")
    app.command("table")(with_options(model(table)))
    app.command("find")(with_options(model(find)))


def table(
    images: Images,
    column: Annotated[
        list[str],
        typer.Option(
            "--column",
            "-c",
            metavar="'NAME [TYPE]: QUESTION'",
            help="A column; TYPE is text, int, float, bool, or choices such as indoors|outdoors; "
            "repeatable.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The table: .csv, .jsonl or .parquet.")],
    cells: CellsFile = None,
    model: ModelFlags = BUILTIN_MODEL,
    *,
    given: dict[str, Any],
) -> None:
    """Ask the same questions about each image alone; one row per image, a column per question.

    Cells are kept in OUT.cells, so that an interrupted run resumes and a later run computes only
    new images and columns. Exit code 1 if an image failed.
    """
    from ..chat.columns import Column, read_columns
    from ..chat.table import check_names

    columns = read_columns([Column.from_text(text) for text in column])
    check_names(columns)
    if out.suffix not in SUFFIXES:
        raise OptionError(f"the table ends in {', '.join(SUFFIXES)}, not {out.name!r}")
    if out.suffix == ".parquet":
        _pyarrow()
    cells = cells or out.with_name(out.name + ".cells")
    if out.exists() and not cells.exists():
        raise DataError(f"{out} already exists; delete it or choose another file")
    options = Options(**given)
    lazy = LazyModel(model.with_adapter(options.adapter, generation_config="none"))  # greedy
    rows = compute(lazy, _files(images), columns, options, cells)
    _write(out, rows, columns)
    failed = _report(rows, columns)
    print(
        f"{out}: {len(rows)} images, {len(columns)} columns, {failed} images with an error",
        file=sys.stderr,
    )
    if failed:
        raise typer.Exit(1)


def find(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="QUESTION IMAGE...",
            help="A yes/no question, and images, videos, folders of them, or patterns.",
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Print this many images.")] = 20,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a report with the images.")
    ] = None,
    cells: CellsFile = None,
    as_json: flags.Json = False,
    model: ModelFlags = BUILTIN_MODEL,
    *,
    given: dict[str, Any],
) -> None:
    """Rank images by the probability that the answer to a yes/no question is yes.

    Exit code 1 if an image failed.
    """
    from ..chat.columns import Column
    from ..chat.table import find_hits

    question, images = flags.question_and_files(words)
    if not images:
        raise OptionError(f"there are no images next to the question {question!r}")
    columns = [Column("hit", question, bool)]
    options = Options(**given)
    lazy = LazyModel(model.with_adapter(options.adapter, generation_config="none"))  # greedy
    rows = compute(lazy, _files(images), columns, options, cells)
    hits = find_hits(rows, "hit")
    expected = sum(1 - hit.probability for hit in hits if hit.probability >= 0.5)
    yes = sum(hit.probability >= 0.5 for hit in hits)
    shown = hits[:top]
    if as_json:
        found = [dataclasses.asdict(hit) | {"source": str(hit.source)} for hit in shown]
        terminal.print_json({"question": question, "expected_false": expected, "hits": found})
    else:
        for hit in shown:
            print(f"{hit.probability:6.1%}  {hit.source}")
    print(
        f"{yes} of {len(hits)} images are more likely yes than no; by these probabilities about "
        f"{expected:.1f} of them are wrong",
        file=sys.stderr,
    )
    if html is not None:
        lazy_bot = lazy.ready(options)
        thumbnails = [
            (hit, _thumbnail(lazy_bot.processor.loader, Path(str(hit.source)))) for hit in shown
        ]
        reports.write(
            html, "find.html", title=question, hits=thumbnails, yes=yes, count=len(hits),
            expected=expected,
        )  # fmt: skip
        terminal.wrote(html)
    if _report(rows, columns):
        raise typer.Exit(1)


def compute(
    lazy: LazyModel,
    files: Sequence[Path],
    columns: Sequence[Column],
    options: Options,
    cells_file: Path | None,
) -> list[Row]:
    """The rows of a table; cells that `cells_file` has are not computed again."""
    from ..chat.table import Cell, TableRun

    digests = [_digest(path) for path in files]
    about = {**lazy.about, "options": dataclasses.asdict(options)}
    journal: Journal | None = None

    def key(index: int, column: Column) -> str:
        return f"{digests[index]}:{_column_digest(column)}"

    def known(index: int, column: Column) -> Cell | None:
        name = key(index, column)
        return Cell(**journal.row(name)["cell"]) if journal and name in journal.done else None

    run = TableRun(lazy.ready(options), columns, options, known)  # refuses before a file is made
    with contextlib.ExitStack() as stack, terminal.progress_bar("answering") as progress:
        if cells_file is not None:
            stack.enter_context(terminal.resumable(cells_file))
            journal = stack.enter_context(Journal(cells_file, about))
        rows: list[Row] = []
        progress(0, len(files))
        for index, row in enumerate(run.rows(files)):
            rows.append(row)
            if journal is not None:
                new = {key(index, column): row[column.name] for column in columns}
                journal.add(
                    {"id": name, "file": str(row.source), "cell": dataclasses.asdict(cell)}
                    for name, cell in new.items()
                    if not cell.error and name not in journal.done
                )
            progress(index + 1, len(files))
    return rows


def _files(words: Sequence[str]) -> list[Path]:
    """The files of words and of the folders among them."""
    from ..chat.attachments import media_files

    files: list[Path] = []
    for word in flags.expand(words):
        if word == "-" or word.startswith(("http://", "https://", "data:")):
            raise MediaError(f"a table reads files and folders, not {word!r}")
        path = Path(word)
        files += media_files(path) if path.is_dir() else [path]
    return files


def _digest(path: Path) -> str:
    """A hash of a file's bytes; of a file that cannot be read, of its name."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError:
        return "unreadable " + str(path)


def _column_digest(column: Column) -> str:
    text = json.dumps([column.question, column.type.__name__, column.choices])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _write(out: Path, rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """Write the table; the file appears when it is complete."""
    from ..chat.table import to_json

    flat = [to_json(row, columns) for row in rows]
    draft = out.with_name(f".{out.name}.draft")
    if out.suffix == ".parquet":
        pyarrow, parquet = _pyarrow()
        parquet.write_table(pyarrow.Table.from_pylist(flat), draft)
    else:
        with draft.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            if out.suffix == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in flat)
            else:
                writer = csv.DictWriter(file, list(flat[0]))
                writer.writeheader()
                writer.writerows(flat)
    draft.replace(out)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise Unsupported(
            "a .parquet table needs pyarrow: pip install 'llava-interleave[parquet]', or write "
            ".csv or .jsonl"
        ) from error
    return pyarrow, parquet


def _report(rows: Sequence[Row], columns: Sequence[Column]) -> int:
    """Print failed images and doubtful columns on stderr; returns the number of failed images."""
    failed = [(row.source, cell.error) for row in rows for cell in row.cells.values() if cell.error]
    reasons = dict(failed)  # one per image
    for source, reason in list(reasons.items())[:SHOWN]:
        print(f"  {source}: {reason}", file=sys.stderr)
    if len(reasons) > SHOWN:
        print(f"  and {len(reasons) - SHOWN} more images with an error", file=sys.stderr)
    for column in columns:
        doubtful = sum(
            not row[column.name].error and row[column.name].allowed < ALLOWED_WARNING
            for row in rows
        )
        if doubtful:
            print(
                f"column {column.name}: in {doubtful} of {len(rows)} images the model wanted to "
                "write something that the type does not allow; do not rely on those cells",
                file=sys.stderr,
            )
    return len(reasons)


def _thumbnail(loader: Any, path: Path) -> str:
    """A small JPEG as a data URL; of a video its first frame."""
    from ..chat.attachments import part
    from ..processing import FrameSampling

    if part(path)["type"] == "video":
        image = loader.video(path, FrameSampling(frames=1)).frames[0]
    else:
        image = loader.image(path)
    return reports.data_url(image, THUMBNAIL, quality=80)
