"""`llava eval`: ask a model the questions of benchmarks and score its answers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, LlavaError, OptionError
from ..options import Options, unknown
from . import terminal

if TYPE_CHECKING:
    from ..evals.stats import Line
    from ..evals.task import Answerer, Task
    from ..journal import JsonRow

INTERLEAVE = ("interleave-in", "interleave-out", "interleave-views")
PUBLISHED = (
    "ai2d", "blink", "docvqa", "muirbench", "mvbench", "nextqa", "nlvr2", "pope", "qbench", "raven", "scanqa", "vqav2",
)  # fmt: skip
TASKS = (*INTERLEAVE, *PUBLISHED)
THIN = ("image_token_pool", "video_token_pool", "image_token_ratio", "video_token_ratio")


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    ctx: typer.Context,
    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK... | diff A B",
            help=f"{', '.join(TASKS)}; module:Task for a task of your own; or two files to compare.",
        ),
    ],
    model: terminal.ModelName = None,
    url: Annotated[
        str | None,
        typer.Option(help="Ask an OpenAI-compatible server instead: http://host:port/v1."),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File with the server's API key."),
    ] = None,
    data: Annotated[
        Path, typer.Option(help="Folder of the data sets; a missing file says what to fetch.")
    ] = Path("data"),
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder of TASK.jsonl; a run that was stopped goes on there."
        ),
    ] = None,
    html: Annotated[
        bool,
        typer.Option(
            "--html", help="Also write TASK.html to --out, with every example and its pictures."
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only list broken samples; exit code 1 if there are any."),
    ] = False,
    as_published: Annotated[
        bool,
        typer.Option(
            "--as-published", help="LLaVA-Interleave Bench with the slips of its published scripts."
        ),
    ] = False,
    questions: Annotated[
        int | None,
        typer.Option("-n", min=1, help="Only the first questions of each data set, this many."),
    ] = None,
    task_options: Annotated[
        list[str] | None,
        typer.Option(
            "--task-option", metavar="KEY=VALUE", help="An option of module:Task; several times."
        ),
    ] = None,
    save_errors: Annotated[
        Path | None,
        typer.Option(help="Write the rows that scored below 1 into this file, as JSON lines."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="How messages become tokens; without it as the task was published."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer; without it the task's.")
    ] = None,
    anyres: Annotated[bool, typer.Option("--anyres", help="Cut single images into tiles.")] = False,
    frames: Annotated[
        int | None, typer.Option(min=1, help="At most this many frames of a video.")
    ] = None,
    image_token_pool: Annotated[
        int, typer.Option(min=1, help="Average each square of so many features a side of an image.")
    ] = 1,
    video_token_pool: Annotated[int, typer.Option(min=1, help="The same of a video's frames.")] = 1,
    image_token_ratio: Annotated[
        float, typer.Option(help="Keep this share of an image's tokens, those that differ most.")
    ] = 1.0,
    video_token_ratio: Annotated[
        float, typer.Option(help="The same of each frame of a video.")
    ] = 1.0,
    adapter: Annotated[
        str | None,
        typer.Option(help="Answer through this adapter: its folder or Hugging Face name."),
    ] = None,
    together: Annotated[
        int, typer.Option("--batch", min=1, help="Questions that are computed together.")
    ] = 50,
    revision: terminal.Revision = None,
    precision: terminal.Precision = "auto",
    device: terminal.Device = "auto",
    as_json: terminal.Json = False,
) -> None:
    """Ask the questions of benchmarks and score the answers; `diff A B` compares two result files example by example."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {
        name
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    }
    if tasks[0] == "diff":
        _only_given(given, {"tasks", "as_json"}, "diff takes two result files and --json")
        compare(tasks[1:], as_json)
        return
    for name in tasks:
        if name not in TASKS and not _is_custom(name):
            raise unknown("task", name, TASKS)
    if task_options and not any(map(_is_custom, tasks)):
        raise OptionError("--task-option is for module:Task")
    if as_published and not set(tasks) & set(INTERLEAVE):
        raise OptionError(f"--as-published is for {', '.join(INTERLEAVE)}")
    if html and not out:
        raise OptionError("--html writes beside the results: name their folder with --out")
    if url:
        its = {"preset", "anyres", "frames", *THIN, "adapter", "revision", "precision", "device"}
        _only_given(given, ctx.params.keys() - its, "with --url these are the server's")
    elif key_file:
        raise OptionError("--key-file is for --url")
    if check:
        _only_given(given, {"tasks", "data", "check"}, "--check asks nothing")
    loaded = [
        _task(name, data, as_published, questions, task_options or ())
        for name in dict.fromkeys(tasks)
    ]
    if frames and (fixed := [task.name for task in loaded if task.fixed_frames]):
        raise OptionError(
            f"the questions of {fixed[0]} say how many frames of a video are used: leave out --frames"
        )
    if check:
        faults = [f"{task.name}: {fault}" for task in loaded for fault in task.faults]
        print("\n".join(faults) or "no broken samples")
        raise typer.Exit(bool(faults))

    from ..evals import report, run, stats
    from ..journal import Journal

    reports: dict[str, Any] = {}
    errors: list[JsonRow] = []
    answerers = _Answerers(model, url, key_file, revision, precision, device, adapter)
    for task in loaded:
        options = Options(
            preset=preset or task.preset,
            max_new_tokens=max_new_tokens or task.max_new_tokens,
            anyres=anyres,
            frames=frames,
            image_token_pool=image_token_pool,
            video_token_pool=video_token_pool,
            image_token_ratio=image_token_ratio,
            video_token_ratio=video_token_ratio,
            adapter=adapter,
        )
        answer, how = answerers.of(options)
        about = run.about(
            task, how | ({"as_published": as_published} if task.name in INTERLEAVE else {})
        )
        with TemporaryDirectory() as scratch:
            folder = out or Path(scratch)
            with (
                Journal(folder / f"{task.name}.jsonl", about) as journal,
                terminal.counting(task.name) as progress,
            ):
                rows = run.run(task, answer, journal, batch=together, say=progress)
        lines = stats.summary(task, rows)
        errors += [row for row in run.counted(rows) if row["score"] < 1]
        if html:
            with terminal.busy("writing the report"):
                report.write(folder / f"{task.name}.html", task, rows, lines, about)
        reports[task.name] = {
            "run": about,
            "lines": [dataclasses.asdict(line) for line in lines],
            "faults": list(task.faults),
        }
        if not as_json:
            title = f"{answerers.title}: {task.name}" + (f", {task.note}" if task.note else "")
            terminal.table(title, *_table(task, lines))
            _remarks(task)
    if save_errors:
        save_errors.write_text("".join(json.dumps(row) + "\n" for row in errors), "utf-8")
    if as_json:
        print(json.dumps(reports))


def _only_given(given: Collection[str], allowed: Collection[str], why: str) -> None:
    if others := sorted("--" + name.replace("_", "-") for name in given if name not in allowed):
        raise OptionError(f"{why}: leave out {', '.join(others)}")


def _table(task: Task, lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """The means, with what was published beside them."""
    rows = []
    for line in lines:
        published = [
            f"{figures[line.name]:.1f}" if line.name in figures else ""
            for figures in task.paper.values()
        ]
        own = [
            f"{line.mean:.2%}",
            f"{line.low:.1%} to {line.high:.1%}",
            str(line.asked),
            str(line.failed),
        ]
        rows.append([line.name, *own, *published])
    return ["", "mean", "95 % interval", "asked", "failed", *task.paper], rows


def _remarks(task: Task) -> None:
    if task.paper:
        print(
            f"The columns {', '.join(task.paper)} are published figures in percent, made with {task.pipeline}."
        )
    if task.faults:
        print(
            f"{len(task.faults)} broken samples were left out (--check lists them).",
            file=sys.stderr,
        )


def _is_custom(name: str) -> bool:
    """Whether a task's name is an import path, `module:Task`."""
    return ":" in name


def _task(
    name: str,
    data: Path,
    as_published: bool,
    questions: int | None,
    task_options: Sequence[str],
) -> Task:
    """A task; of each data set only the first `questions` conversations if that is given."""
    from ..evals import custom, interleave, published

    with terminal.busy(f"reading {name}"):
        if _is_custom(name):
            task = custom.load(name, task_options)
        elif name in INTERLEAVE:
            task = interleave.load(name, data, as_published=as_published)
        else:
            task = published.load(name, data)
    if not task.examples:
        raise DataError(f"{name} has no sample that can be asked; --check says why")
    if questions is None:
        return task
    taken: dict[str, int] = {}
    chosen: dict[str, Any] = {}
    for example in task.examples:
        if example.follows in chosen or (
            not example.follows and taken.get(example.group, 0) < questions
        ):
            chosen[example.id] = example
            taken[example.group] = taken.get(example.group, 0) + (not example.follows)
    return task.but(examples=list(chosen.values()))


class _Answerers:
    """What answers, by options: the model on this machine or a server; with how it answers, for the results file."""

    def __init__(
        self,
        model: str | None,
        url: str | None,
        key_file: Path | None,
        revision: str | None,
        precision: str,
        device: str,
        adapter: str | None,
    ) -> None:
        self.url, self.key = url, key_file.read_text().strip() if key_file else None
        if url:
            from . import remote

            self.title = model or remote.only_model(url, self.key)
        else:
            from .local_model import LazyModel

            self.local = LazyModel(model, revision, precision, device, adapter)
            self.title = self.local.folder.name

    def of(self, options: Options) -> tuple[Answerer, dict[str, Any]]:
        sampling = {"temperature": 0.0, "max_new_tokens": options.max_new_tokens}
        if self.url:
            from . import remote

            answer = remote.answerer(
                self.url, self.title, self.key, temperature=0, max_tokens=options.max_new_tokens
            )
            servers = dict.fromkeys(
                ("fingerprint", "precision", "device", "preset", "geometry"), "the server's"
            )
            return answer, {"model": self.title, "url": self.url, **servers, "sampling": sampling}

        from .local_model import answer_all

        def here(asked: Sequence[list[dict[str, Any]]]) -> list[str | LlavaError]:
            bot = self.local.ready(options)  # loaded only when something is left to ask
            return [
                said if isinstance(said, LlavaError) else said.text
                for said in answer_all(bot.batch, asked, options)
            ]

        geometry = "anyres" if options.anyres else "squash"
        geometry += "".join(
            f", {name} {getattr(options, name)}" for name in THIN if getattr(options, name) != 1
        )
        sampling |= {"frames": options.frames}
        return here, {
            **self.local.about,
            "preset": options.preset,
            "geometry": geometry,
            "sampling": sampling,
        }


def compare(files: Sequence[str], as_json: bool) -> None:
    """Print how two runs differ, by group and in all, and what was different in how they were made."""
    if len(files) != 2:
        raise OptionError(
            f"diff takes two result files, not {len(files)}: llava eval diff A.jsonl B.jsonl"
        )
    from ..evals import stats
    from ..journal import read

    (made_a, a), (made_b, b) = (read(Path(file)) for file in files)
    for key in ("task", "data"):
        if made_a.get(key) != made_b.get(key):
            raise DataError(
                f"the two runs have another {key}: {made_a.get(key)!r} and {made_b.get(key)!r}"
            )
    found = stats.compare(a, b)
    changed = {
        key: [made_a.get(key), made_b.get(key)]
        for key in made_a | made_b
        if made_a.get(key) != made_b.get(key)
    }
    alone = [_only(a, b), _only(b, a)]
    if as_json:
        print(
            json.dumps(
                {
                    "changed": changed,
                    "only_in": alone,
                    "lines": [dataclasses.asdict(line) for line in found],
                }
            )
        )
        return
    rows = []
    for d in found:
        shares = [f"{d.a:.2%}", f"{d.b:.2%}", f"{d.b - d.a:+.2%}", f"{d.low:+.1%} to {d.high:+.1%}"]
        rows.append([d.name, *shares, *map(str, (d.pairs, d.better, d.worse)), f"{d.p:.3g}"])
    columns = ["", "A", "B", "B - A", "95 % interval", "pairs", "B > A", "A > B", "p"]
    terminal.table(f"{made_a['task']}: A is {files[0]}, B is {files[1]}", columns, rows)
    for key, (old, new) in changed.items():
        print(f"{key}: {old} | {new}")
    if any(alone):
        print(f"left out: {alone[0]} examples that only A has, {alone[1]} that only B has")


def _only(rows: Sequence[JsonRow], others: Sequence[JsonRow]) -> int:
    return len({row["id"] for row in rows} - {row["id"] for row in others})
