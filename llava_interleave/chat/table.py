"""Questions about each of many images, one image per prompt: rows of typed cells."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LlavaError, MediaError, OptionError
from ..options import Options
from ..prompt import Prompt
from ..structured_output.grammar import GrammarCompiler, GrammarMatcher
from . import attachments
from .columns import Column, Value
from .detokenize import Answer, TokenLogprob
from .engine_driver import GenerationJob

if TYPE_CHECKING:
    from ..processing import Tokenizer
    from .chatbot import Chatbot

IMAGES_IN_FLIGHT = 8
"""Images whose cells are computed together."""
TOP = 20
"""Alternatives of a token that are looked at for yes and no."""
REASON_TOKENS = 64
"""Most tokens of an answer with its reasons before the value."""
CLEAR = 0.5
"""The share of the probability that allowed values, or yes and no, have where a model says one."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One answer.

    value: None with an `error`. probability: of the value among the values that the column
    allows, given the image and the question; 0 to 1. allowed: the share of the model's probability
    that went to allowed values at all; below a half the model wanted to write something else.
    """

    value: Value | None
    probability: float = 0.0
    allowed: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of one image by column name. source: as it was given, or its path in a folder."""

    source: object
    cells: Mapping[str, Cell]

    def __getitem__(self, name: str) -> Cell:
        return self.cells[name]


@dataclass(frozen=True, slots=True)
class Hit:
    """An image and the probability that the answer to a question about it is yes."""

    source: object
    probability: float
    allowed: float


Alternatives = tuple[str, Sequence[tuple[str, float]]]
"""The text of a token, and the most probable texts there with their log-probabilities."""
Known = Callable[[int, Column], Cell | None]
"""The cell of image number i that is there already, or None."""


def sources(images: str | os.PathLike[str] | Sequence[object]) -> list[object]:
    """The files of a folder in natural order, or the images as given.

    Raises `MediaError` for a folder without images or videos.
    """
    if isinstance(images, str | os.PathLike):
        folder = Path(images).expanduser()
        if not folder.is_dir():
            raise MediaError(f"{folder} is not a folder; one image is given in a list")
        return list(attachments.media_files(folder))
    return list(images)


class TableRun:
    """Computes the cells of one table.

    Each cell is the answer to its question about its image alone, so cells do not depend on each
    other. A failed image has its error in all of its cells.
    """

    def __init__(
        self, bot: Chatbot, columns: Sequence[Column], options: Options, known: Known | None = None
    ) -> None:
        unused = (
            options.temperature,
            options.n - 1,
            options.orders - 1,
            options.stop,
            options.cite,
        )
        if any(unused) or options.logprobs is not None:
            raise OptionError(
                "a table's answers are greedy, one per cell: leave out temperature, n, orders, "
                "logprobs, stop and cite"
            )
        self.bot, self.columns = bot, columns
        self.known = known
        self.options = {
            column: options.but({"logprobs": TOP} | ({} if _limited(column) else {"stop": "\n"}))
            for column in columns
        }
        self.grammars = GrammarCompiler(bot.processor.tokenizer)

    def rows(self, images: Sequence[object]) -> Generator[Row]:
        """A row per image, in order; those of `IMAGES_IN_FLIGHT` images at a time."""
        try:
            numbered = list(enumerate(images))
            for start in range(0, len(numbered), IMAGES_IN_FLIGHT):
                window = numbered[start : start + IMAGES_IN_FLIGHT]
                cells: list[dict[str, Cell]] = [{} for _ in window]
                for column in self.columns:
                    self._column(column, window, cells)
                for (_, source), row in zip(window, cells, strict=True):
                    yield Row(source, row)
        finally:
            self.grammars.close()

    def _column(
        self,
        column: Column,
        window: Sequence[tuple[int, object]],
        cells: Sequence[dict[str, Cell]],
    ) -> None:
        """Compute a column of a window into its `cells`."""
        options, waiting = self.options[column], list[tuple[dict[str, Cell], Prompt]]()
        for (index, source), row in zip(window, cells, strict=True):
            known = self.known(index, column) if self.known else None
            if known is not None:
                row[column.name] = known
                continue
            failed = next((cell for cell in row.values() if cell.error), None)
            if failed is not None:
                row[column.name] = failed
                continue
            try:
                prompt = self.bot.prompt(self.bot.turn(column.question, [source]), options)
            except LlavaError as error:
                row[column.name] = Cell(None, error=str(error))
                continue
            waiting.append((row, prompt))
        self._answer(column, waiting)

    def _answer(self, column: Column, waiting: Sequence[tuple[dict[str, Cell], Prompt]]) -> None:
        """Compute the cells of prompts together; if one fails, each alone."""
        if not waiting:
            return
        options, tokenizer = self.options[column], self.bot.processor.tokenizer
        jobs = [GenerationJob(prompt, options, i) for i, (_, prompt) in enumerate(waiting)]
        matchers: list[GrammarMatcher] = []
        limits = column.response_format
        if limits is not None:
            matchers = self.grammars.compile(limits, len(jobs))
            for job, matcher in zip(jobs, matchers, strict=True):
                job.constraints = [matcher]
        try:
            answers = self.bot.answer_jobs(jobs)
        except LlavaError as error:
            if len(waiting) == 1:
                waiting[0][0][column.name] = Cell(None, error=str(error))
            else:
                for one in waiting:
                    self._answer(column, [one])
            return
        unsure = []
        for number, ((row, prompt), answer) in enumerate(zip(waiting, answers, strict=True)):
            failure = matchers[number].failure if matchers else ""
            row[column.name] = cell = read_cell(column, answer, tokenizer, failure)
            if wants_reasons(column, cell):
                unsure.append((row, prompt))
        if unsure:
            self._read_reasoned(column, unsure)

    def _read_reasoned(
        self, column: Column, waiting: Sequence[tuple[dict[str, Cell], Prompt]]
    ) -> None:
        """Replace the cells of a model that writes its reasons before the value."""
        options = self.options[column]
        most = min(options.max_new_tokens or REASON_TOKENS, REASON_TOKENS)
        options = options.but({"stop": "\n", "max_new_tokens": most})
        jobs = [GenerationJob(prompt, options, i) for i, (_, prompt) in enumerate(waiting)]
        try:
            answers = self.bot.answer_jobs(jobs)
        except LlavaError:
            for one in waiting if len(waiting) > 1 else ():
                self._read_reasoned(column, [one])
            return
        for (row, _), answer in zip(waiting, answers, strict=True):
            cell = read_reasoned(column, answer, self.bot.processor.tokenizer)
            row[column.name] = cell or row[column.name]


def _limited(column: Column) -> bool:
    return column.response_format is not None


def read_cell(column: Column, answer: Answer, tokenizer: Tokenizer, failure: str = "") -> Cell:
    """The cell of an answer with `logprobs`. failure: why its grammar could not continue."""
    assert answer.logprobs is not None
    if failure or answer.finish_reason != "stop":
        reason = failure or (
            f"the answer is longer than max_new_tokens ({len(answer.tokens)}): {answer.text!r}"
            if answer.finish_reason == "length"
            else f"the answer only repeats itself: {answer.text[:80]!r}"
        )
        return Cell(None, error=reason)
    if column.type is bool and (found := yes_or_no(answer.logprobs[0], tokenizer)):
        yes, no = found
        return Cell(yes >= no, max(yes, no) / (yes + no), min(1.0, yes + no))
    written = answer.logprobs
    allowed = sum(token.allowed_logprob for token in written)
    probability = math.exp(sum(token.logprob for token in written) - allowed)
    # the token that ends an answer is not part of its value
    share = sum(token.allowed_logprob for token in written[: -1 if len(written) > 1 else None])
    return Cell(column.parse(answer.text.strip()), min(1.0, probability), math.exp(share))


def wants_reasons(column: Column, cell: Cell) -> bool:
    """Whether a question is put again without a limit, for `read_reasoned`."""
    return _limited(column) and not cell.error and cell.allowed < CLEAR


def read_reasoned(column: Column, answer: Answer, tokenizer: Tokenizer) -> Cell | None:
    """The cell of a free answer with reasons before the value: "top left, bottom right: 2", "This
    is a crab, so no."; None without a value.

    A bool is read by `find_verdict`, a number at the end of the answer, a choice there behind a
    colon. Of these both probabilities are the one of the value's tokens, at most what they are by
    definition.
    """
    written, limits = answer.logprobs or (), column.response_format
    assert limits is not None
    if column.type is bool:
        if (found := find_verdict(alternatives(written, tokenizer))) is None:
            return None
        yes, no = found
        return Cell(yes >= no, max(yes, no) / (yes + no), min(1.0, yes + no))
    if column.choices:  # "bottom left" is not the choice "left"
        before, pattern = r"^|:\s", "|".join(map(re.escape, column.choices))
    else:
        before, pattern = r"^|[\s:]", limits["regex"]
    match = re.search(rf"(?:{before})({pattern})[\s.]*$", answer.text)
    if match is None or answer.finish_reason != "stop":
        return None
    start, stop = (len(answer.text[:at].encode()) for at in match.span(1))
    logprob, at = 0.0, 0
    for token in written:
        end = at + len(tokenizer.token_bytes(token.token))
        logprob += token.logprob if at < stop and end > start else 0.0
        at = end
    probability = math.exp(logprob)
    return Cell(column.parse(match[1]), probability, probability)


def find_verdict(written: Sequence[Alternatives]) -> tuple[float, float] | None:
    """The probabilities of yes and no at the token where an answer says one of them, as in "This is
    a crab, so no."; None where they never have half of the probability together."""
    for text, top in written:
        if text.strip().lower() in ("yes", "no"):
            found = sum_yes_and_no(top)
            if found and sum(found) >= CLEAR:
                return found
    return None


def probability_of_yes(written: Sequence[Alternatives]) -> float | None:
    """Of yes against no where an answer says one of them, else at its first token; None where
    neither is among the most probable tokens there."""
    found = find_verdict(written) or sum_yes_and_no(written[0][1])
    return found[0] / sum(found) if found else None


def alternatives(written: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[Alternatives]:
    """The texts of tokens and of their alternatives."""
    return [
        (tokenizer.decode([one.token]), [(tokenizer.decode([t]), p) for t, p in one.top])
        for one in written
    ]


def yes_or_no(token: TokenLogprob, tokenizer: Tokenizer) -> tuple[float, float] | None:
    """As `sum_yes_and_no`, of an answer's first token."""
    return sum_yes_and_no((tokenizer.decode([one]), logprob) for one, logprob in token.top)


def sum_yes_and_no(top: Iterable[tuple[str, float]]) -> tuple[float, float] | None:
    """The probabilities of yes and of no at an answer's first token, in either case; None where
    neither is among its most probable tokens.

    top: the texts of those, with their log-probabilities.
    """
    sums = {"yes": 0.0, "no": 0.0}
    for text, logprob in top:
        word = text.strip().lower()
        for answer in sums:
            if word and answer.startswith(word):
                sums[answer] += math.exp(logprob)
    return (sums["yes"], sums["no"]) if any(sums.values()) else None


def find_hits(rows: Sequence[Row], name: str) -> list[Hit]:
    """The images of a bool column without an error, the most probable yes first."""
    hits = []
    for row in rows:
        cell = row[name]
        if not cell.error:
            yes = cell.probability if cell.value else 1 - cell.probability
            hits.append(Hit(row.source, yes, cell.allowed))
    return sorted(hits, key=lambda hit: -hit.probability)


def check_names(columns: Sequence[Column]) -> None:
    """Raise `OptionError` where two keys of `to_json` would be the same."""
    kinds = ("", "_probability", "_allowed")
    names = ["file", "error", *(column.name + kind for column in columns for kind in kinds)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OptionError(
            f"the table would have two columns {', '.join(twice)}: file, error and the names that "
            "end in _probability and _allowed are made for each table; rename the column"
        )


def to_json(row: Row, columns: Sequence[Column]) -> dict[str, Any]:
    """A row as a flat JSON object: `file`, then `NAME`, `NAME_probability` and `NAME_allowed` of
    each column, and `error`.
    """
    flat: dict[str, Any] = {"file": str(row.source)}
    errors = []
    for column in columns:
        cell = row[column.name]
        flat[column.name] = cell.value
        flat[f"{column.name}_probability"] = None if cell.error else round(cell.probability, 6)
        flat[f"{column.name}_allowed"] = None if cell.error else round(cell.allowed, 6)
        errors += [cell.error] if cell.error and cell.error not in errors else []
    return flat | {"error": "; ".join(errors) or None}
