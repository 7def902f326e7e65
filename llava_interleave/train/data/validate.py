"""Validation before training: samples are read, their media decoded, their tokens counted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ...errors import LlavaError, MediaError
from ...processing import FrameSampling, Loader, Processor
from ...processing.loader import name_of
from .datasets import RawSample
from .formats import DataIssue, Reading, reading
from .samples import SampleFormat

KINDS = ("form", "media", "placeholders", "roles", "empty", "long", "duplicate", "keys")
CHUNK = 256
BLANK = Image.new("RGB", (1, 1))
"""Replaces a frame whose pixels were hashed."""


@dataclass(frozen=True, slots=True)
class ValidatedSample:
    """A sample and its faults.

    tokens: as a checkpoint counts them, None without a checkpoint or with errors. images: with
    video frames. images_first_tokens: tokens with the images first, where the format has that.
    """

    row: RawSample
    faults: tuple[DataIssue, ...]
    tokens: int | None = None
    images: int | None = None
    images_first_tokens: int | None = None

    @property
    def error(self) -> bool:
        return any(fault.error for fault in self.faults)


def validate(
    rows: Sequence[RawSample],
    processor: Processor | None = None,
    tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
    form: SampleFormat = SampleFormat(),  # noqa: B008  frozen
) -> list[ValidatedSample]:
    """Read every sample whole; a processor checks its length against `tokens` and the context.

    progress: called with how many are done, and of how many.
    """
    read = _SampleReader(processor, tokens, form)
    seen: dict[str, ValidatedSample] = {}
    reported: set[tuple[str, str]] = set()
    done: list[ValidatedSample] = []
    last = ""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(rows), CHUNK):
            if progress:
                progress(first, len(rows))
            for checked, key, ignored in pool.map(read, rows[first : first + CHUNK]):
                new = {name for name in ignored if (checked.row.group, name) not in reported}
                if new:  # once for each data set
                    reported |= {(checked.row.group, name) for name in new}
                    remark = DataIssue(
                        "keys",
                        f"sample {checked.row.name} and maybe others of {checked.row.group} have "
                        f"keys that are not read: {', '.join(sorted(new))}",
                        error=False,
                    )
                    checked = replace(checked, faults=(*checked.faults, remark))
                if (
                    done
                    and checked.row.pair
                    and (done[-1].row.pair, last) == (checked.row.pair, key)
                ):
                    fault = DataIssue(
                        "duplicate",
                        f"pair {checked.row.pair} has one answer twice: there is no preference",
                    )
                    checked = replace(checked, faults=(*checked.faults, fault))
                last = key
                if not checked.error and (twin := seen.setdefault(key, checked)) is not checked:
                    text = (
                        f"sample {checked.row.name} has the same text and media as "
                        f"sample {twin.row.name}"
                    )
                    remark = DataIssue("duplicate", text, error=False)
                    checked = replace(checked, faults=(*checked.faults, remark))
                done.append(checked)
    if progress:
        progress(len(rows), len(rows))
    return done


def table(checked: Sequence[ValidatedSample]) -> dict[str, dict[str, int]]:
    """By data set: numbers of samples, of samples with errors, and of samples with each fault."""
    tables: dict[str, dict[str, int]] = {}
    for one in checked:
        counts = tables.setdefault(one.row.group, dict.fromkeys(("samples", "errors", *KINDS), 0))
        for name in (
            "samples",
            *(["errors"] if one.error else []),
            *{fault.kind for fault in one.faults},
        ):
            counts[name] += 1
    return tables


class _SampleReader:
    """Reads one sample; results of files are cached."""

    def __init__(self, processor: Processor | None, tokens: int, form: SampleFormat) -> None:
        self.processor, self.tokens, self.form = processor, tokens, form
        self.loader = processor.loader if processor else Loader()
        self.cache: dict[tuple[object, ...] | None, str | LlavaError] = {}

    def __call__(self, row: RawSample) -> tuple[ValidatedSample, str, set[str]]:
        """The sample, a hash of its text and media, and its ignored keys."""
        found = reading(row.sample, row.root, row.name)
        faults = list(found.faults)
        if row.pair and found.messages and not found.messages[-1].get("loss", True):
            text = (
                f"the last answer of sample {row.name} is without loss, and a pair learns from it"
            )
            faults.append(DataIssue("form", text))
        rest = iter(found.media)
        shown = []
        for slot in found.slots:
            source = next(rest) if slot.source is None else slot.source
            seen = self._seen(slot.kind, source, slot.sampling)
            if isinstance(seen, LlavaError):
                faults.append(DataIssue("media", f"sample {row.name}: {seen}"))
            else:
                shown.append(seen)
        counts: list[int] = []
        if self.processor and not any(fault.error for fault in faults):
            counts = self._count(self.processor, found, row.name, faults)
        words = [
            (turn["role"], turn.get("loss", True), _words(turn["content"]))
            for turn in found.messages
        ]
        key = hashlib.blake2b(
            json.dumps([words, shown]).encode("utf-8", "backslashreplace"), digest_size=16
        ).hexdigest()
        return ValidatedSample(row, tuple(faults), *counts), key, found.ignored

    def _seen(
        self, kind: str | None, source: Any, sampling: FrameSampling | None
    ) -> str | LlavaError:
        """A hash of the pixels that training would use, or the error of reading them."""
        key = (
            (kind, str(source), sampling)
            if isinstance(source, str | os.PathLike) and str(source)[:5] != "data:"
            else None
        )
        if key in self.cache:
            return self.cache[key]
        state = hashlib.blake2b(digest_size=16)

        def take(image: Image.Image) -> Image.Image:
            state.update(repr(image.size).encode() + image.tobytes())
            return BLANK

        found: str | LlavaError
        try:
            if kind == "video" or (kind is None and self.loader.resolve(source)[0]):
                chosen = sampling or FrameSampling()
                if self.processor and (chosen.frames, chosen.fps, chosen.times) == (
                    None,
                    None,
                    None,
                ):
                    chosen = replace(chosen, frames=self.processor.num_frames)
                self.loader.video(source, chosen, each=take)
            else:
                take(self.loader.image(source))
            found = state.hexdigest()
        except LlavaError as error:
            found = error
        except OSError as error:  # a name that no file can have
            found = MediaError(f"{name_of(source)}: {error.strerror}")
        if key is not None:
            self.cache[key] = found
        return found

    def _count(
        self, processor: Processor, found: Reading, name: str, faults: list[DataIssue]
    ) -> list[int]:
        """Tokens, images and, where the format has it, tokens with the images first.

        What is wrong with them is added to `faults`.
        """
        layouts = (False, True) if self.form.images_first_ratio else (False,)
        try:
            sizes = [
                self.form.count(processor, found.messages, found.media, images_first=images_first)
                for images_first in layouts
            ]
        except LlavaError as error:
            faults.append(DataIssue("form", f"sample {name}: {error}"))
            return []
        counts = [tokens for tokens, _ in sizes]
        for limit, what, way in (
            (processor.config.text.context, "the context", "shorten it, or show less in it"),
            (self.tokens, "a batch", "raise --tokens, or shorten it"),
        ):
            if max(counts) > limit:
                text = (
                    f"sample {name} has {max(counts):,} tokens, more than the {limit:,} of {what}: "
                    f"{way}"
                )
                faults.append(DataIssue("long", text))
                break
        return [counts[0], sizes[0][1], *counts[1:]]


def _words(content: Any) -> Any:
    """The text of a message, without the sources of its media."""
    if isinstance(content, str):
        return [content]
    return [
        (part.get("type"), part.get("text")) if isinstance(part, dict) else str(part)
        for part in content
    ]
