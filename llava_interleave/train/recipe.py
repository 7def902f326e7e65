"""A training run's settings: one frozen record; TOML keys, flags and what lies beside every checkpoint come from its fields."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..options import unknown

FOLDER = Path(__file__).parent / "recipes"
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
RESUMABLE_FIELDS = frozenset(
    {
        *("source", "media", "skip_errors", "device", "workers", "recompute"),
        *(
            "save_every",
            "save_minutes",
            "keep",
            "evaluate_every",
            "answers",
            "log_every",
            "tensorboard",
        ),
    }
)
"""Settings that a run may go on with another value of: they change no weight (of other data `run` itself takes note)."""
FEW_BITS = ("int8", "int4", "fp8", "nf4")
"""Precisions of frozen weights; listed here, since a recipe is read without PyTorch."""


def _setting(default: Any, sentence: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": sentence})


class _Table:
    """Checks the types of all fields, and that numbers are not below nought."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for field, hint in fields(type(self)):
            value = getattr(self, field.name)
            if not _fits(value, hint):
                raise OptionError(f"{field.name} must be {_told(hint)}, not {value!r}")
            if isinstance(value, int | float) and not (
                0 <= value < math.inf or field.name == "seed"
            ):
                raise OptionError(f"{field.name} must be a number from 0 on, and is {value}")
        self.check()

    def check(self) -> None:
        """Raises OptionError for values that do not fit each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dpo(_Table):
    """Preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): which of two answers is the better one is learnt."""

    beta: float = _setting(0.1, "How strongly the model is held to the one it began as.")
    smoothing: float = _setting(
        0.0, "Share of pairs taken to be the wrong way round, below 0.5 (label smoothing)."
    )
    ipo: bool = _setting(
        False,
        "The squared loss of IPO (Azar et al. 2023) instead of the sigmoid; it has no smoothing.",
    )

    def check(self) -> None:
        if self.beta == 0:
            raise OptionError("beta must be above 0: with 0 nothing is learnt")
        if self.smoothing >= 0.5:
            raise OptionError(
                f"smoothing must be below 0.5, where both answers count alike, and is {self.smoothing}"
            )
        if self.ipo and self.smoothing:
            raise OptionError(
                f"ipo has no smoothing, and smoothing is {self.smoothing}: leave out one of them"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter(_Table):
    """Low-rank matrices beside linears, which alone are trained (LoRA); the defaults are those of LLaVA-NeXT's training code."""

    rank: int = _setting(64, "Rank of the matrices.")
    alpha: float = _setting(16.0, "They are scaled by alpha / rank.")
    dropout: float = _setting(0.05, "Share of their inputs left out while training.")
    targets: tuple[str, ...] = _setting(
        ("language_model.*",),
        "Patterns of the linears that get them: language_model.*, *.q_proj; can be given several times.",
    )
    rslora: bool = _setting(False, "Scale by alpha / sqrt(rank) instead.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(_Table):
    """All that decides what a run does. Without `dpo` it learns answers."""

    model: str | None = _setting(
        None, "The checkpoint to begin with: a folder or a Hugging Face name."
    )
    source: Path | None = _setting(
        None, "Samples: .json or .jsonl, a .yaml mixture of those, or a folder of pictures."
    )  # noqa: RUF009
    media: Path | None = _setting(
        None, "Folder where relative paths of media begin; without it beside the file."
    )  # noqa: RUF009
    question: str | None = _setting(None, "What is asked about the pictures of a folder.")
    held_out: float | None = _setting(
        None,
        "Share of every data set that is not trained on but measured; without it 0.1 of a folder, nothing of a file.",
    )
    skip_errors: bool = _setting(
        False, "Leave out samples with errors and list them, instead of refusing to start."
    )
    seed: int = _setting(0, "Order of the samples, and what is drawn or held out.")
    template: str = _setting(
        "chat", "How a sample is laid out: chat, or plain, images and answer alone."
    )
    anyres: bool = _setting(False, "Cut the image of a sample with one image into tiles.")
    front: float = _setting(
        0.0,
        "Share of samples with several images, drawn anew in every pass, whose images all stand before the text.",
    )
    steps: int | None = _setting(None, "How many times the weights change; or say `epochs`.")
    epochs: float | None = _setting(None, "How many times every sample is seen; or say `steps`.")
    lr: float = _setting(1e-5, "Peak learning rate.")
    warmup: float = _setting(0.03, "Share of the steps over which the learning rate rises.")
    schedule: str = _setting("cosine", "How the learning rate falls then: cosine or linear.")
    final: float = _setting(0.0, "Share of the peak at which it ends.")
    tower: float = _setting(0.0, "Factor on the learning rate of the vision tower; 0 freezes it.")
    projector: float = _setting(1.0, "Factor on the learning rate of the projector; 0 freezes it.")
    decoder: float = _setting(1.0, "Factor on the learning rate of the decoder; 0 freezes it.")
    decay: float = _setting(0.0, "Weight decay of matrices.")
    beta2: float = _setting(0.999, "Decay of AdamW's second moment.")
    clip: float = _setting(1.0, "Largest norm of a step's gradient.")
    tokens: int = _setting(8192, "Most tokens of a batch; samples are packed, never cut.")
    images: int = _setting(
        0, "Most images and frames of a batch, whatever its tokens; 0 for no such bound."
    )
    accumulate: int = _setting(1, "Batches a step, of all processes together.")
    recompute: bool = _setting(
        False, "Keep what goes into layers only and compute the rest again: slower, in less memory."
    )
    bfloat16: bool = _setting(
        False, "Multiply matrices in bfloat16, where that is faster; weights stay float32."
    )
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N.")
    workers: int = _setting(1, "Processes that read samples ahead; 0 reads them in between.")
    save_every: int = _setting(200, "Steps between checkpoints.")
    save_minutes: float = _setting(0.0, "A checkpoint also every so many minutes; 0 for none.")
    keep: int = _setting(
        1, "How many of the last checkpoints are kept, beside the best by held-out loss."
    )
    evaluate_every: int = _setting(
        0, "Steps between measurements of what is held out; 0 only before and after."
    )
    answers: int = _setting(4, "Held-out questions that are answered at each measurement.")
    log_every: int = _setting(10, "Steps between lines of the log.")
    precision: str | None = _setting(
        None,
        "Hold the weights beside an adapter in int8 or int4, or on a GPU fp8 or nf4; without it as they are stored.",
    )
    tensorboard: bool = _setting(False, "Write the log for TensorBoard too.")
    dpo: Dpo | None = _setting(None, "Learn from pairs of answers.")  # noqa: RUF009
    adapter: Adapter | None = _setting(
        None, "Train an adapter; the factors are those of its matrices."
    )  # noqa: RUF009

    def check(self) -> None:
        for name in ("accumulate", "tokens", "save_every", "keep", "log_every", "clip", "lr"):
            if getattr(self, name) == 0:
                raise OptionError(f"{name} must be above 0")
        for name, known in (("template", ("chat", "plain")), ("schedule", ("cosine", "linear"))):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        for name, most in (
            ("held_out", 0.9),
            ("warmup", 1.0),
            ("final", 1.0),
            ("front", 1.0),
            ("beta2", 0.9999),
        ):
            if (getattr(self, name) or 0) > most:
                raise OptionError(f"{name} must be at most {most}, and is {getattr(self, name)}")
        if self.steps == 0 or self.epochs == 0:
            raise OptionError("steps and epochs must be above 0")
        if self.steps and self.epochs:
            raise OptionError(
                f"steps ({self.steps}) and epochs ({self.epochs}) both say how long: leave out one of them"
            )
        if self.precision and self.precision not in FEW_BITS:
            raise unknown("precision", self.precision, FEW_BITS)
        if self.precision and not self.adapter:
            raise OptionError(
                f"precision {self.precision} is for weights beside an adapter: train one (--adapter-rank), or leave it out"
            )
        if not self.tower + self.projector + self.decoder:
            raise OptionError("tower, projector and decoder are all 0: nothing is left to train")
        if self.template == "plain" and (self.front or self.dpo or self.anyres):
            other = "front" if self.front else "dpo" if self.dpo else "anyres"
            raise OptionError(
                f"template plain shows whole images and one answer: leave out {other}"
            )
        if self.dpo and self.front:
            raise OptionError(
                "front is for answers, and dpo learns from pairs: leave out one of them"
            )

    def but(self, given: Mapping[str, Any]) -> Recipe:
        """This with other values; those of a table by `table.field`. Raises OptionError."""
        values: dict[str, Any] = {}
        for name, value in given.items():
            table, dot, field = name.partition(".")
            if dot:
                so_far = values.get(table) or getattr(self, table) or TABLES[table]()
                values[table] = dataclasses.replace(so_far, **{field: value})
            else:
                values[name] = value
        for one, other in (
            ("steps", "epochs"),
            ("epochs", "steps"),
        ):  # who says one means it instead of the recipe's other
            if one in values and other not in values:
                values[other] = None
        return dataclasses.replace(self, **values)

    def stored(self) -> dict[str, Any]:
        """All settings as JSON and TOML have them; what is None is not there."""
        made = dataclasses.asdict(self)
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in made.items()
            if value is not None
        }

    def toml(self) -> str:
        """All settings as a file that `read` reads."""
        made = self.stored()
        tables = {name: made.pop(name) for name in TABLES if name in made}
        lines = [_line(name, value) for name, value in made.items()]
        for name, table in tables.items():
            lines += [f"\n[{name}]", *(_line(field, value) for field, value in table.items())]
        return "\n".join(lines) + "\n"


TABLES: dict[str, type[Dpo] | type[Adapter]] = {"dpo": Dpo, "adapter": Adapter}


def fields(record: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a record, each with its type."""
    hints = typing.get_type_hints(record)
    return [(field, hints[field.name]) for field in dataclasses.fields(record)]


def find(name: str) -> Path:
    """The file of a recipe: a .toml file, or one that is shipped. Raises OptionError."""
    if name.endswith(".toml"):
        return Path(name)
    if name not in SHIPPED:
        raise unknown("recipe", name, SHIPPED)
    return FOLDER / f"{name}.toml"


def read(path: Path) -> Recipe:
    """The recipe of a TOML file; its relative paths begin beside it. Raises OptionError with the file's name."""
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{path} cannot be read as TOML: {error}") from error
    try:
        for name, table in TABLES.items():
            if name in values:
                if not isinstance(values[name], dict):
                    raise OptionError(f"{name} must be a table, [{name}]")
                values[name] = _record(table, values[name], f"{name}.")
        for name in ("source", "media"):
            if isinstance(values.get(name), str):
                values[name] = path.parent.absolute() / values[name]
        if isinstance(model := values.get("model"), str) and (path.parent / model).is_dir():
            values["model"] = str((path.parent / model).absolute())
        return _record(Recipe, values)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


T = typing.TypeVar("T")


def _record(record: type[T], values: Mapping[str, Any], where: str = "") -> T:
    known = [field.name for field, _ in fields(record)]
    if odd := next((name for name in values if name not in known), None):
        raise unknown("key", where + odd, [where + name for name in known])
    return record(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
    )


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return (
            isinstance(value, tuple)
            and bool(value)
            and all(isinstance(item, str) for item in value)
        )
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint in (int, bool) else isinstance(value, hint)


def _told(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "a list of texts"
    kinds = typing.get_args(hint) or (hint,)
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Path: "a path",
    }
    return " or ".join(words[kind] for kind in kinds if kind in words) or "a table"


def _line(name: str, value: object) -> str:
    """TOML's basic strings, numbers and truth values are JSON's, but for DEL."""
    return f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
