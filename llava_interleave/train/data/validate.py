"""Validation before training: samples are read, their media decoded, their tokens counted."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from stat import S_ISDIR
from typing import Any, NamedTuple

from PIL import Image

from ...errors import DataError, LlavaError, MediaError
from ...processing import FrameSampling, Loader, Processor
from ...processing.loader import name_of
from . import formats
from .datasets import KTO_LABEL, RawSample
from .formats import DataIssue, Reading, reading
from .samples import SampleFormat, move_images_first

KINDS = ("form", "media", "placeholders", "roles", "empty", "long", "duplicate", "keys")
CHUNK, AHEAD = 256, 64
"""Samples that a process reads at once, and how many chunks wait for each other at most."""
PROCESSES_FROM = 4096
"""Samples from which it pays to start processes, seconds each."""
MAX_CACHED = 1 << 20
"""Media whose results a process keeps, about 200 bytes each."""
BLANK = Image.new("RGB", (1, 1))
"""Replaces a frame whose pixels were hashed."""


class Stat(NamedTuple):
    """A file as it was when it was read. size: in bytes; mtime, ctime: in nanoseconds."""

    path: str
    size: int
    mtime: int
    ctime: int


def stats(path: str) -> Iterator[Stat]:
    """Of a file; of a folder and all below it; of nothing a size of -1."""
    try:
        found = os.stat(path)  # noqa: PTH116  a Path for each of many files takes longer
    except (OSError, ValueError):
        yield Stat(path, -1, 0, 0)
        return
    folder = S_ISDIR(found.st_mode)
    yield Stat(path, 0 if folder else found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if folder:
        for name in sorted(os.listdir(path)):  # noqa: PTH208
            yield from stats(f"{path}/{name}")


@dataclass(slots=True)
class ValidatedSample:
    """A sample and its faults.

    tokens: as a checkpoint counts them, None without a checkpoint or with errors. images: with
    video frames. images_first_tokens: tokens with the images first, where the format has that.
    digest: of its text and pixels. media: its local files that were not seen before.
    """

    row: RawSample
    faults: tuple[DataIssue, ...]
    tokens: int | None = None
    images: int | None = None
    images_first_tokens: int | None = None
    digest: bytes = b""
    media: tuple[Stat, ...] = ()

    @property
    def error(self) -> bool:
        return any(fault.error for fault in self.faults)


def validate(
    rows: Sequence[RawSample],
    processor: Processor | None = None,
    tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
    form: SampleFormat = SampleFormat(),  # noqa: B008  frozen
    *,
    decode: bool = True,
) -> Iterator[ValidatedSample]:
    """Read every sample whole, in order; a processor checks its length against `tokens` and the
    context.

    Many are read by processes, one each core. progress: called with how many are done, and of how
    many. decode: all images; without, those whose files are not seen to be whole, and digests are
    of the files.
    """
    seen: dict[int, str] = {}
    reported: set[tuple[str, str]] = set()
    before: tuple[str, bytes] | None = None
    with _chunks(rows, _SampleReader(processor, tokens, form, decode)) as chunks:
        done = 0
        for chunk in chunks:
            if progress:
                progress(done, len(rows))
            for checked, ignored in chunk:
                done += 1
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
                this = checked.row.pair, checked.digest
                kto = KTO_LABEL in checked.row.sample
                if checked.row.pair and before == this and not kto:
                    fault = DataIssue(
                        "duplicate",
                        f"pair {checked.row.pair} has one answer twice: there is no preference",
                    )
                    checked = replace(checked, faults=(*checked.faults, fault))
                before = this
                code = int.from_bytes(checked.digest[:8], "little")
                name = checked.row.name
                if not checked.error and (twin := seen.setdefault(code, name)) is not name:
                    text = f"sample {name} has the same text and media as sample {twin}"
                    remark = DataIssue("duplicate", text, error=False)
                    checked = replace(checked, faults=(*checked.faults, remark))
                yield checked
    if progress:
        progress(len(rows), len(rows))


Chunk = list[tuple[ValidatedSample, set[str]]]


@contextmanager
def _chunks(rows: Sequence[RawSample], read: _SampleReader) -> Iterator[Iterator[Chunk]]:
    """The validated samples in chunks, with their ignored keys; by threads or, of many, processes.

    Parsing and counting tokens hold Python's lock, so threads are no faster than one.
    """
    firsts = range(0, len(rows), CHUNK)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if len(rows) < PROCESSES_FROM or cores == 1:
        with ThreadPoolExecutor(cores) as pool:
            yield (list(pool.map(read, rows[first : first + CHUNK])) for first in firsts)
        return
    context = multiprocessing.get_context("spawn")
    processes = ProcessPoolExecutor(cores, context, _begin, (rows, read))
    try:
        yield _in_order(processes, firsts)
    except BrokenProcessPool as error:  # multiprocessing.Pool would wait for ever
        raise DataError(
            "a process that validates samples was killed: if memory was short, run with less next "
            "to it"
        ) from error
    finally:
        processes.shutdown(cancel_futures=True)


def _in_order(processes: ProcessPoolExecutor, firsts: range) -> Iterator[Chunk]:
    """The chunks in order, of which a few are read ahead."""
    rest, ahead = iter(firsts), deque[Future[Chunk]]()
    while True:
        ahead.extend(
            processes.submit(_read_chunk, first) for first in islice(rest, AHEAD - len(ahead))
        )
        if not ahead:
            return
        yield ahead.popleft().result()


def _begin(rows: Sequence[RawSample], read: _SampleReader) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process decides
    global _work
    _work = rows, read


_work: tuple[Sequence[RawSample], _SampleReader] | None = None
"""What a process of `_chunks` works on."""


def _read_chunk(first: int) -> Chunk:
    assert _work
    rows, read = _work
    chunk = list(map(read, rows[first : first + CHUNK]))
    for one, _ in chunk:  # the parent process needs no more of a sample than its label
        row = one.row
        label = {KTO_LABEL: row.sample[KTO_LABEL]} if KTO_LABEL in row.sample else {}
        one.row = RawSample(
            label, row.root, row.name, row.group, row.place, row.pair, row.weight, row.block
        )
    return chunk


def tally(counts: dict[str, dict[str, int]], one: ValidatedSample) -> bool:
    """Count a sample by its data set: samples, samples with errors, samples with each fault."""
    row = counts.setdefault(one.row.group, dict.fromkeys(("samples", "errors", *KINDS), 0))
    kinds = {fault.kind for fault in one.faults}
    for name in ("samples", *(["errors"] if one.error else []), *kinds):
        row[name] += 1
    return True


class _SampleReader:
    """Reads one sample; results of files are cached."""

    def __init__(
        self, processor: Processor | None, tokens: int, form: SampleFormat, decode: bool
    ) -> None:
        self.processor, self.tokens, self.form, self.decode = processor, tokens, form, decode
        self.loader = processor.loader if processor else Loader()
        self.cache: dict[int, str | LlavaError] = {}

    def __call__(self, row: RawSample) -> tuple[ValidatedSample, set[str]]:
        """The sample, and its ignored keys."""
        if plain := self._plain(row):
            return plain, set()
        found = reading(row.sample, row.root, row.name)
        faults = list(found.faults)
        if row.pair and found.messages and not found.messages[-1].get("loss", True):
            text = (
                f"the last answer of sample {row.name} is without loss, and a pair learns from it"
            )
            faults.append(DataIssue("form", text))
        if row.pair and any(turn.get("loss", 1) not in (0, 1) for turn in found.messages):
            faults.append(DataIssue("form", f"pair {row.pair} has a weight: pairs have none"))
        rest = iter(found.media)
        shown, files = [], list[Stat]()
        for slot in found.slots:
            source = next(rest) if slot.source is None else slot.source
            seen = self._seen(slot.kind, source, slot.sampling, files)
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
        label = [row.sample[KTO_LABEL]] if KTO_LABEL in row.sample else []
        digest = _digest([words, shown, *label])
        size, images, images_first = (tuple(counts) + (None,) * 3)[:3]
        about = ValidatedSample(
            row, tuple(faults), size, images, images_first, digest, tuple(files)
        )
        return about, found.ignored

    def _plain(self, row: RawSample) -> ValidatedSample | None:
        """A faultless sample of M4-Instruct's form, in a third of the time; None for another."""
        turns = formats.plain_turns(row.sample)
        if turns is None or self.form.template != "chat":
            return None
        texts, names = turns
        files = list[Stat]()
        root = os.fspath(row.root)
        images = [os.path.join(root, name) for name in names]  # noqa: PTH118  Path takes longer
        shown = [self._seen("image", image, None, files) for image in images]
        if any(isinstance(one, LlavaError) for one in shown):
            return None
        counts: tuple[int | None, int | None] = None, None
        if processor := self.processor:
            try:
                tokens, images_first = self.form.count_turns(processor, texts, images)
            except LlavaError:
                return None
            if max(tokens, images_first) > min(self.tokens, processor.config.text.context):
                return None
            counts = tokens, images_first if self.form.images_first_ratio else None
        words = [
            (("user", "assistant")[number % 2], True, [text]) for number, text in enumerate(texts)
        ]
        digest = _digest([words, shown])
        size, images_first_tokens = counts
        count = len(images) if processor else None
        return ValidatedSample(row, (), size, count, images_first_tokens, digest, tuple(files))

    def _seen(
        self, kind: str | None, source: Any, sampling: FrameSampling | None, files: list[Stat]
    ) -> str | LlavaError:
        """A hash of the pixels that training would use or of the file, or the error of reading it.

        files: gets the local files that were not in the cache.
        """
        key = (
            hash((kind, str(source), sampling))
            if isinstance(source, str | os.PathLike) and str(source)[:5] != "data:"
            else None
        )
        if key in self.cache:
            return self.cache[key]
        parts = source if isinstance(source, list | tuple) else [source]
        if isinstance(source, str | os.PathLike | list | tuple):
            local = [os.fspath(one) for one in parts if isinstance(one, str | os.PathLike)]
            files += [stat for path in local if path[:5] != "data:" for stat in stats(path)]
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
            elif self.decode:
                take(self.loader.image(source))
            else:
                state.update(self.loader.fingerprint(source))
            found = state.hexdigest()
        except LlavaError as error:
            found = error
        except OSError as error:  # a name that no file can have
            found = MediaError(f"{name_of(source)}: {error.strerror}")
        if key is not None:
            if len(self.cache) >= MAX_CACHED:
                self.cache.clear()
            self.cache[key] = found
        return found

    def _count(
        self, processor: Processor, found: Reading, name: str, faults: list[DataIssue]
    ) -> list[int]:
        """Tokens, images and, where the format has it, tokens with the images first.

        What is wrong with them is added to `faults`.
        """
        count = partial(self.form.count, processor, media=found.media)
        try:
            sizes = [count(found.messages)]
            if self.form.images_first_ratio and len(found.slots) > 1:
                moved = move_images_first(found.messages, len(found.media))
                sizes += [count(moved)] if moved is not found.messages else []
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
        first = [counts[-1]] if self.form.images_first_ratio else []
        return [counts[0], sizes[0][1], *first]


def _digest(about: Any) -> bytes:
    text = json.dumps(about).encode("utf-8", "backslashreplace")
    return hashlib.blake2b(text, digest_size=16).digest()


def _words(content: Any) -> Any:
    """The text of a message, without the sources of its media."""
    if isinstance(content, str):
        return [content]
    return [
        (part.get("type"), part.get("text")) if isinstance(part, dict) else str(part)
        for part in content
    ]
