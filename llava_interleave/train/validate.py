"""Every sample of a data set is read, its media decoded and its tokens counted, before anything is trained on it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ..errors import LlavaError, MediaError
from ..processing import FrameSampling, Loader, Processor
from ..processing.loader import name_of
from .datasets import RawSample
from .formats import DataIssue, Reading, reading
from .samples import SampleFormat

KINDS = ("form", "media", "placeholders", "roles", "empty", "long", "duplicate")
CHUNK = 256
BLANK = Image.new("RGB", (1, 1))
"""What is kept of a frame that was looked at."""


@dataclass(frozen=True, slots=True)
class ValidatedSample:
    """A sample that was read. tokens: as a checkpoint counts them, None where none was given or the sample has errors.

    images: with frames of videos. front: tokens with the images in front, where the form has that.
    """

    row: RawSample
    faults: tuple[DataIssue, ...]
    tokens: int | None = None
    images: int | None = None
    front: int | None = None

    @property
    def error(self) -> bool:
        return any(fault.error for fault in self.faults)


def check(
    rows: Sequence[RawSample],
    processor: Processor | None = None,
    tokens: int = 8192,
    say: Callable[[int, int], None] | None = None,
    form: SampleFormat = SampleFormat(),  # noqa: B008  frozen
) -> list[ValidatedSample]:
    """Read every sample whole. With a processor also its length in `form` is checked: against `tokens` and the context."""
    look = _Look(processor, tokens, form)
    seen: dict[str, ValidatedSample] = {}
    done: list[ValidatedSample] = []
    last = ""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(rows), CHUNK):
            if say:
                say(first, len(rows))
            for checked, key in pool.map(look, rows[first : first + CHUNK]):
                if (
                    done
                    and checked.row.pair
                    and (done[-1].row.pair, last) == (checked.row.pair, key)
                ):
                    fault = DataIssue(
                        "duplicate",
                        f"pair {checked.row.pair} has one answer twice: there is nothing to prefer",
                    )
                    checked = replace(checked, faults=(*checked.faults, fault))
                last = key
                if not checked.error and (twin := seen.setdefault(key, checked)) is not checked:
                    text = f"sample {checked.row.name} says the same about the same pictures as sample {twin.row.name}"
                    remark = DataIssue("duplicate", text, error=False)
                    checked = replace(checked, faults=(*checked.faults, remark))
                done.append(checked)
    if say:
        say(len(rows), len(rows))
    return done


def table(checked: Sequence[ValidatedSample]) -> dict[str, dict[str, int]]:
    """By data set, in the order they come: how many samples there are, have errors, and have each kind of fault."""
    made: dict[str, dict[str, int]] = {}
    for one in checked:
        counts = made.setdefault(one.row.group, dict.fromkeys(("samples", "errors", *KINDS), 0))
        for name in (
            "samples",
            *(["errors"] if one.error else []),
            *{fault.kind for fault in one.faults},
        ):
            counts[name] += 1
    return made


class _Look:
    """Reads one sample; what it learns of a file it remembers."""

    def __init__(self, processor: Processor | None, tokens: int, form: SampleFormat) -> None:
        self.processor, self.tokens, self.form = processor, tokens, form
        self.loader = processor.loader if processor else Loader()
        self.known: dict[tuple[object, ...] | None, str | LlavaError] = {}

    def __call__(self, row: RawSample) -> tuple[ValidatedSample, str]:
        """The sample, and a hash of what it says and shows."""
        found = reading(row.sample, row.root, row.name)
        faults = list(found.faults)
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
        words = [(turn["role"], _words(turn["content"])) for turn in found.said]
        key = hashlib.blake2b(
            json.dumps([words, shown]).encode("utf-8", "backslashreplace"), digest_size=16
        ).hexdigest()
        return ValidatedSample(row, tuple(faults), *counts), key

    def _seen(
        self, kind: str | None, source: Any, sampling: FrameSampling | None
    ) -> str | LlavaError:
        """A hash of the pixels that are looked at, or why there are none."""
        key = (
            (kind, str(source), sampling)
            if isinstance(source, str | os.PathLike) and str(source)[:5] != "data:"
            else None
        )
        if key in self.known:
            return self.known[key]
        state = hashlib.blake2b(digest_size=16)

        def take(picture: Image.Image) -> Image.Image:
            state.update(repr(picture.size).encode() + picture.tobytes())
            return BLANK

        found: str | LlavaError
        try:
            if kind == "video" or (kind is None and self.loader.is_video(source)):
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
            self.known[key] = found
        return found

    def _count(
        self, processor: Processor, found: Reading, name: str, faults: list[DataIssue]
    ) -> list[int]:
        """Tokens and images of the sample, and its tokens with the images in front; what is wrong with that goes to `faults`."""
        try:
            fronts = (False, True) if self.form.front else (False,)
            sizes = [
                self.form.count(processor, found.said, found.media, front=front) for front in fronts
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
                text = f"sample {name} has {max(counts):,} tokens, more than the {limit:,} of {what}: {way}"
                faults.append(DataIssue("long", text))
                break
        return [counts[0], sizes[0][1], *counts[1:]]


def _words(content: Any) -> Any:
    """What a message says, without where its pictures come from."""
    if isinstance(content, str):
        return [content]
    return [
        (part.get("type"), part.get("text")) if isinstance(part, dict) else str(part)
        for part in content
    ]
