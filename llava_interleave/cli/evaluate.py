"""`llava eval`: ask a model the questions of benchmarks and score its answers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, LlavaError, OptionError
from ..options import Options, unknown
from . import flags, remote, terminal
from .local_model import LazyModel, ModelFlags, answer_all

if TYPE_CHECKING:
    from ..chat import Answer
    from ..evals.task import AnswerFn, Reply, Task
    from ..journal import JsonRow
    from ..processing import Tokenizer

INTERLEAVE = ("interleave-in", "interleave-out", "interleave-views")
PUBLISHED = (
    "ai2d", "blink", "docvqa", "muirbench", "mvbench", "nextqa",
    "nlvr2", "pope", "qbench", "raven", "scanqa", "vqav2",
)  # fmt: skip
TASKS = (*INTERLEAVE, *PUBLISHED, "haystack", "world")
REDUCTION = ("image_token_pool", "video_token_pool", "image_token_ratio", "video_token_ratio")
OPTIONS = ("preset", "max_new_tokens", "anyres", "frames", *REDUCTION, "orders", "adapter")
LOGPROBS = 20
"""Alternatives of a token among which yes and no are looked for."""


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


@flags.with_flags(
    "overrides",
    Options,
    only=OPTIONS,
    defaults={"preset": "the task's", "max_new_tokens": "the task's"},
    overrides=True,
)
def evaluate(
    ctx: typer.Context,
    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK... | diff A B",
            help=f"{', '.join(TASKS)}; module:Task for your own; or two result files to compare.",
        ),
    ],
    model: flags.ModelName = None,
    url: Annotated[
        str | None,
        typer.Option(help="Evaluate an OpenAI-compatible server instead: http://host:port/v1."),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File with the server's API key."),
    ] = None,
    data: Annotated[
        Path, typer.Option(help="Folder of the data sets; errors say what to download.")
    ] = Path("data"),
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of TASK.jsonl; an interrupted run resumes there."),
    ] = None,
    html: Annotated[
        bool,
        typer.Option(
            "--html", help="Also write TASK.html to --out, with every example and its images."
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only list broken samples; exit code 1 if there are any."),
    ] = False,
    as_published: Annotated[
        bool,
        typer.Option(
            "--as-published", help="Reproduce the bugs of LLaVA-Interleave Bench's scripts."
        ),
    ] = False,
    rules: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="lmms-eval",
            help="Score by the rules of lmms-eval; docs/evaluation.md says where they differ.",
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option("-n", min=1, help="Only the first N questions of each data set."),
    ] = None,
    task_options: Annotated[
        list[str] | None,
        typer.Option(
            "--task-option",
            metavar="KEY=VALUE",
            help="An option of haystack (images=1,2,4,8 questions=20 seed=0) or of module:Task; "
            "repeatable.",
        ),
    ] = None,
    save_errors: Annotated[
        Path | None,
        typer.Option(help="Write the rows that scored below 1 to this file, as JSON lines."),
    ] = None,
    calibration: Annotated[
        bool,
        typer.Option(
            "--calibration",
            help="Also report how well the model's probabilities tell right answers from wrong "
            "ones; haystack always does.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 50,
    revision: flags.Revision = None,
    precision: flags.Precision = "auto",
    device: flags.Device = "auto",
    as_json: flags.Json = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """Run benchmarks and score the answers; `diff A B` compares two result files by example."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    used = {
        name
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    }
    if tasks[0] == "diff":
        _only(used, {"tasks", "as_json"}, "diff takes two result files and --json")
        compare(tasks[1:], as_json)
        return
    _check_flags(used, ctx.params)
    from ..evals import tasks as by_name

    loaded = []
    for name in dict.fromkeys(tasks):
        with terminal.spinner(f"reading {name}"):
            loaded.append(
                by_name.load(
                    name,
                    data,
                    questions=questions,
                    options=task_options or (),
                    as_published=as_published and name in INTERLEAVE,
                    rules=rules,
                )
            )
    fixed = [task.name for task in loaded if task.fixed_frames]
    if fixed and "frames" in overrides:
        raise OptionError(
            f"the questions of {fixed[0]} state their number of video frames: leave out --frames"
        )
    if check:
        faults = [f"{task.name}: {fault}" for task in loaded for fault in task.faults]
        print("\n".join(faults) or "no broken samples")
        raise typer.Exit(bool(faults))

    from ..evals import report, run, stats

    reports: dict[str, Any] = {}
    errors: list[JsonRow] = []
    answerer = (
        _Remote(url, model, key_file)
        if url
        else _Local(ModelFlags(model, revision, precision, device, overrides.get("adapter")))
    )
    for task in loaded:
        options = Options(preset=task.preset, max_new_tokens=task.max_new_tokens).but(overrides)
        settings = answerer.about(options)
        if task.logprobs or calibration:
            options, settings["logprobs"] = options.but({"logprobs": LOGPROBS}), True
        if task.name in INTERLEAVE:
            settings["as_published"] = as_published
        if rules:
            settings["as"] = rules
        about = run.about(task, settings)
        with terminal.resumable(out) if out else contextlib.nullcontext():
            rows = _answers(task, answerer.with_options(options), about, out, batch_size)
        means = stats.summary(task, rows)
        errors += [row for row in run.scored_rows(rows) if row["score"] < 1]
        if html and out:
            with terminal.spinner("writing the report"):
                report.write(out / f"{task.name}.html", task, rows, means, about)
            terminal.wrote(out / f"{task.name}.html")
        reports[task.name] = {
            "run": about,
            "means": [dataclasses.asdict(mean) for mean in means],
            "faults": list(task.faults),
        }
        if not as_json:
            title = f"{answerer.title}: {task.name}" + (f", {task.note}" if task.note else "")
            terminal.table(title, *report.mean_table(task, means))
            _remarks(task)
    if save_errors:
        save_errors.write_text("".join(json.dumps(row) + "\n" for row in errors), "utf-8")
        terminal.wrote(save_errors)
    if as_json:
        print(json.dumps(reports))


def _check_flags(used: Collection[str], params: Mapping[str, Any]) -> None:
    """Raises `OptionError` for flags that exclude or need each other. used: those that were given,
    params: the values of all.
    """
    for name in params["tasks"]:
        if name not in TASKS and not _is_custom(name):
            raise unknown("task", name, TASKS)
    own = [n for n in params["tasks"] if _is_custom(n) or n in ("haystack", "world")]
    if params["task_options"] and not own:
        raise OptionError("--task-option is for haystack, world and module:Task")
    if params["as_published"] and not set(params["tasks"]) & set(INTERLEAVE):
        raise OptionError(f"--as-published is for {', '.join(INTERLEAVE)}")
    if params["rules"] not in (None, "lmms-eval"):
        raise unknown("value of --as", str(params["rules"]), ("lmms-eval",))
    if params["rules"] and params["as_published"]:
        raise OptionError("--as-published and --as are two sets of rules; choose one")
    if params["html"] and not params["out"]:
        raise OptionError("--html needs a folder: name it with --out")
    if params["url"]:
        local = {*OPTIONS, "revision", "precision", "device"} - {"max_new_tokens"}
        _only(used, params.keys() - local, "with --url these are the server's")
    elif params["key_file"]:
        raise OptionError("--key-file is for --url")
    if params["check"]:
        _only(used, {"tasks", "data", "check"}, "--check runs no model")


def _answers(
    task: Task, answer: AnswerFn, about: dict[str, Any], out: Path | None, batch_size: int
) -> list[JsonRow]:
    """The rows of all examples; those in the journal of `out` are not computed again."""
    from ..evals import run
    from ..journal import Journal

    with (
        TemporaryDirectory() as scratch,
        Journal((out or Path(scratch)) / f"{task.name}.jsonl", about) as journal,
        terminal.progress_bar(task.name) as progress,
    ):
        return run.run(task, answer, journal, batch_size=batch_size, progress=progress)


def _only(used: Collection[str], allowed: Collection[str], why: str) -> None:
    if others := sorted("--" + name.replace("_", "-") for name in used if name not in allowed):
        raise OptionError(f"{why}: leave out {', '.join(others)}")


def _remarks(task: Task) -> None:
    if task.paper:
        print(
            f"The columns {', '.join(task.paper)} are published results in percent, "
            f"made with {task.pipeline}."
        )
    if task.faults:
        print(
            f"{len(task.faults)} broken samples were left out (--check lists them).",
            file=sys.stderr,
        )


def _is_custom(name: str) -> bool:
    """Whether a task's name is an import path, `module:Task`."""
    return ":" in name


class _Remote:
    """A model behind an OpenAI-compatible server. title: its name."""

    def __init__(self, url: str, model: str | None, key_file: Path | None) -> None:
        self.url, self.key = url, key_file.read_text().strip() if key_file else None
        self.title = model or remote.only_model(url, self.key)

    def about(self, options: Options) -> dict[str, Any]:
        """How it answers, for the results file."""
        unknown = ("fingerprint", "precision", "device", "preset", "geometry")
        sampling = {"temperature": 0.0, "max_new_tokens": options.max_new_tokens}
        return {
            "model": self.title,
            "url": self.url,
            **dict.fromkeys(unknown, "the server's"),
            "sampling": sampling,
        }

    def with_options(self, options: Options) -> AnswerFn:
        return remote.answerer(
            self.url,
            self.title,
            self.key,
            logprobs=options.logprobs is not None,
            temperature=0,
            max_tokens=options.max_new_tokens,
        )


class _Local:
    """A model on this machine, loaded for the first question. title: its folder's name."""

    def __init__(self, model: ModelFlags) -> None:
        self.model = LazyModel(model)
        self.title = self.model.folder.name

    def about(self, options: Options) -> dict[str, Any]:
        """How it answers, for the results file."""
        reductions = [
            f", {name} {getattr(options, name)}"
            for name in REDUCTION
            if getattr(options, name) != 1
        ]
        return {
            **self.model.about,
            "preset": options.preset,
            "geometry": ("anyres" if options.anyres else "squash") + "".join(reductions),
            "sampling": {
                "temperature": 0.0,
                "max_new_tokens": options.max_new_tokens,
                "frames": options.frames,
                **({"orders": options.orders} if options.orders > 1 else {}),
            },
        }

    def with_options(self, options: Options) -> AnswerFn:
        def answer(conversations: Sequence[list[dict[str, Any]]]) -> list[Reply | LlavaError]:
            bot = self.model.ready(options)
            tokenizer = bot.processor.tokenizer
            return [
                one if isinstance(one, LlavaError) else _reply(one, tokenizer)
                for one in answer_all(bot.batch, conversations, options)
            ]

        return answer


def _reply(answer: Answer, tokenizer: Tokenizer) -> Reply:
    """An answer as a task scores it."""
    from ..chat.table import alternatives, probability_of_yes
    from ..evals.task import Reply

    if not answer.logprobs:
        return Reply(answer.text)
    yes = probability_of_yes(alternatives(answer.logprobs, tokenizer))
    return Reply(answer.text, sum(token.logprob for token in answer.logprobs), yes)


def compare(files: Sequence[str], as_json: bool) -> None:
    """Print how the scores of two runs differ, per group and in all, and how their settings do."""
    if len(files) != 2:
        raise OptionError(
            f"diff takes two result files, not {len(files)}: llava eval diff A.jsonl B.jsonl"
        )
    from ..evals import stats
    from ..journal import read

    (about_a, a), (about_b, b) = (read(Path(file)) for file in files)
    for key in ("task", "data"):
        if about_a.get(key) != about_b.get(key):
            raise DataError(
                f"the two runs differ in {key}: {about_a.get(key)!r} and {about_b.get(key)!r}"
            )
    differences = stats.compare(a, b)
    changed = {
        key: [about_a.get(key), about_b.get(key)]
        for key in about_a | about_b
        if about_a.get(key) != about_b.get(key)
    }
    only_in = [_missing(a, b), _missing(b, a)]
    if as_json:
        print(
            json.dumps(
                {
                    "changed": changed,
                    "only_in": only_in,
                    "differences": [dataclasses.asdict(d) for d in differences],
                }
            )
        )
        return
    rows = []
    for d in differences:
        shares = [f"{d.a:.2%}", f"{d.b:.2%}", f"{d.b - d.a:+.2%}", f"{d.low:+.1%} to {d.high:+.1%}"]
        rows.append([d.name, *shares, *map(str, (d.pairs, d.better, d.worse)), f"{d.p:.3g}"])
    columns = ["", "A", "B", "B - A", "95 % interval", "pairs", "B > A", "A > B", "p"]
    terminal.table(f"{about_a['task']}: A is {files[0]}, B is {files[1]}", columns, rows)
    for key, (old, new) in changed.items():
        print(f"{key}: {old} | {new}")
    if any(only_in):
        print(f"not compared: {only_in[0]} examples only in A, {only_in[1]} only in B")


def _missing(rows: Sequence[JsonRow], others: Sequence[JsonRow]) -> int:
    return len({row["id"] for row in rows} - {row["id"] for row in others})
