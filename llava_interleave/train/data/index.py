"""Validated samples on disk: rows of JSON and a memory-mapped table, about 50 bytes of memory each.

A run reads and decodes its data once. The index is used again while the files of samples, all local
media, the checkpoint's processor and the settings are what they were (by size, mtime and ctime).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from ...errors import DataError
from ...processing import Processor
from .datasets import RawSample, sides
from .formats import ParsedSample
from .samples import PackedSample, SampleFormat
from .shards import remote_files, url_of
from .validate import Stat, ValidatedSample, stats, validate

VERSION = 3
"""Of the files and of the rules of validation."""
ROW = np.dtype(
    [
        ("offset", "<i8"),
        ("tokens", "<i4"),
        ("images_first_tokens", "<i4"),
        ("images", "<i4"),
        ("group", "<i4"),
        ("block", "<i4"),
        ("weight", "<f4"),
        ("digest", "V16"),
    ]
)
PACKED_ROW = struct.Struct("<q5if16s")
"""offset: of the row in rows.jsonl. group: number of the data set. block: of samples that are read
together, or -1. weight: how often it is shown in an epoch. digest: of its text and pixels."""
PROGRESS_SECONDS = 10


class RowFile(Sequence[RawSample]):
    """Samples as they are in their files, copied to one file of JSON lines; any number of them.

    A sample is parsed when it is read. Of a preference pair each side is a sample.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getstate__(self) -> Path:
        return self.folder

    def __setstate__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def write(cls, folder: Path, rows: Iterable[RawSample]) -> RowFile:
        """Copy samples. Raises DataError."""
        folder.mkdir(parents=True)
        offsets, names, offset = [], [], 0
        with (folder / "rows.jsonl").open("wb") as file:
            rest = iter(rows)
            while chunk := list(islice(rest, 8192)):
                starts, hashes = [], []
                for row in chunk:
                    pair = sides(row) is not None
                    sample = row.sample
                    parsed = sample.text if isinstance(sample, ParsedSample) else ""
                    text = parsed or json.dumps(sample, default=str)
                    about = [str(row.root), row.name, row.group, row.place, row.weight, row.block]
                    line = f"[{text}, {json.dumps([*about, pair])[1:]}\n".encode(
                        "utf-8", "backslashreplace"
                    )
                    starts += [offset, offset] if pair else [offset]
                    hashes.append(_hash(row.name))
                    offset += file.write(line)
                offsets.append(np.array(starts, "<i8"))
                names.append(np.array(hashes, "<u8"))
        found, times = np.unique(np.concatenate(names or [np.empty(0, "<u8")]), return_counts=True)
        np.save(folder / "offsets.npy", np.concatenate(offsets or [np.empty(0, "<i8")]))
        # M4-Instruct counts the samples of each of its data sets from 0 on.
        np.save(folder / "repeated.npy", found[times > 1])
        return cls(folder)

    @cached_property
    def offsets(self) -> np.ndarray[Any, Any]:
        return _mapped(self.folder / "offsets.npy")

    @cached_property
    def _repeated(self) -> np.ndarray[Any, Any]:
        return _mapped(self.folder / "repeated.npy")

    @cached_property
    def _data(self) -> mmap.mmap:
        with (self.folder / "rows.jsonl").open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, number: int) -> RawSample: ...
    @overload
    def __getitem__(self, number: slice) -> list[RawSample]: ...
    def __getitem__(self, number: int | slice) -> RawSample | list[RawSample]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        offset = int(self.offsets[number])
        second = number % len(self) > 0 and int(self.offsets[number - 1]) == offset
        found = self.at(offset)
        return found[1 if second else 0]

    def at(self, offset: int) -> tuple[RawSample, ...]:
        """The sample at an offset, or the two sides of a pair."""
        line = self._data[offset : self._data.find(b"\n", offset)]
        sample, root, name, group, place, weight, block, pair = json.loads(line)
        code = _hash(name)
        at = int(np.searchsorted(self._repeated, code))
        if at < len(self._repeated) and self._repeated[at] == code:
            name = f"{name} ({place})"
        row = RawSample(sample, _folder(root), name, group, place, "", weight, block)
        return (sides(row) or (row,)) if pair else (row,)


def _mapped(path: Path) -> np.ndarray[Any, Any]:
    """A memory-mapped array, as an ndarray: the elements of a memmap take ten times as long."""
    return np.load(path, mmap_mode="r").view(np.ndarray)


@cache
def _folder(root: str) -> Path:
    """One object for all samples, which is sent to other processes once."""
    return Path(root)


def _hash(text: str) -> int:
    state = hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8)
    return int.from_bytes(state.digest(), "little")


@dataclass(frozen=True, slots=True)
class _Rows(Sequence[RawSample]):
    """The rows of a stored sample, read when they are looked at."""

    file: RowFile
    offset: int
    sides: int

    def __len__(self) -> int:
        return self.sides

    def __getitem__(self, number: Any) -> Any:
        return self.file.at(self.offset)[number]


class StoredSamples(Sequence[PackedSample]):
    """Samples of an index, by their numbers in its table."""

    def __init__(self, folder: Path, numbers: np.ndarray[Any, Any]) -> None:
        self.folder, self.numbers = folder, numbers

    def __getstate__(self) -> tuple[Path, np.ndarray[Any, Any]]:
        return self.folder, self.numbers

    def __setstate__(self, state: tuple[Path, np.ndarray[Any, Any]]) -> None:
        self.folder, self.numbers = state

    @cached_property
    def _file(self) -> RowFile:
        return RowFile(self.folder)

    @cached_property
    def table(self) -> np.ndarray[Any, Any]:
        return np.load(self.folder / "samples.npy", mmap_mode="r")

    @cached_property
    def pairs(self) -> bool:
        return bool(json.loads((self.folder / "index.json").read_text("utf-8"))["pairs"])

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """A column of the table, of all samples."""
        return np.asarray(self.table[name][self.numbers])

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, number: int) -> PackedSample: ...
    @overload
    def __getitem__(self, number: slice) -> StoredSamples: ...
    def __getitem__(self, number: int | slice) -> PackedSample | StoredSamples:
        if isinstance(number, slice):
            return StoredSamples(self.folder, self.numbers[number])
        row = self.table[self.numbers[number]]
        return PackedSample(
            _Rows(self._file, int(row["offset"]), 2 if self.pairs else 1),
            int(row["tokens"]),
            int(row["images_first_tokens"]),
            int(row["images"]),
        )

    def digest(self) -> str:
        """A hash of what the samples say and show, and how often, 32 hex digits."""
        state = hashlib.blake2b(digest_size=16)
        for name in ("digest", "weight", "block"):
            state.update(np.ascontiguousarray(self.table[name][self.numbers]).tobytes())
        return state.hexdigest()


@dataclass(frozen=True, slots=True)
class Index:
    """An index that is complete. faults: texts of the first errors. duplicates: how many samples
    have the text and media of an earlier one. groups: names of the data sets."""

    folder: Path
    count: int
    errors: int
    faults: tuple[str, ...]
    duplicates: int
    groups: tuple[str, ...]
    pairs: bool

    def samples(self) -> StoredSamples:
        return StoredSamples(self.folder, np.arange(self.count - self.errors, dtype="<i4"))

    def left_out(self) -> Iterator[str]:
        """The first error of each sample that has one."""
        with (self.folder / "errors.jsonl").open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def key(about: Mapping[str, Any]) -> str:
    """The key of an index. about: what else than media it depends on, as JSON."""
    text = json.dumps([VERSION, about], default=str)
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def build(
    folder: Path,
    key: str,
    rows: Callable[[], Iterable[RawSample]],
    processor: Processor,
    tokens: int,
    form: SampleFormat,
    first_error: Callable[[Sequence[ValidatedSample]], str | None],
    log: Callable[[str], None],
) -> Index:
    """The index in `folder`, read again if it is about the same data, else made.

    first_error: of a sample, or of the two sides of a pair. Raises DataError.
    """
    if (found := _opened(folder, key)) and not changed_media(folder):
        log(f"{found.count:,} samples, validated before")
        return found
    draft = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    file = RowFile.write(draft, rows())
    if not len(file):
        raise DataError("there are no samples")
    log(f"reading {len(file):,} samples")
    facts = _validated(draft, file, processor, tokens, form, first_error, log)
    sizes = {path.name: path.stat().st_size for path in draft.iterdir()}
    (draft / "index.json").write_text(json.dumps({"key": key, "sizes": sizes, **facts}), "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)
    done = _opened(folder, key)
    assert done
    return done


def _validated(
    draft: Path,
    file: RowFile,
    processor: Processor,
    tokens: int,
    form: SampleFormat,
    first_error: Callable[[Sequence[ValidatedSample]], str | None],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Validate all rows and write what is known of them."""
    began = last = time.monotonic()
    groups: dict[str, int] = {}
    seen: set[int] = set()
    errors, faults, duplicates, number = 0, list[str](), 0, 0

    def progress(done: int, count: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= PROGRESS_SECONDS:
            last = now
            log(f"validated {done:,} of {count:,} samples, {done / (now - began):,.0f} a second")

    with (
        (draft / "samples.bin").open("wb") as table,
        (draft / "media.jsonl").open("w", encoding="utf-8") as media,
        (draft / "errors.jsonl").open("w", encoding="utf-8") as wrong,
    ):
        group: list[ValidatedSample] = []
        for one in validate(file, processor, tokens, progress, form, decode=False):
            for stat in one.media:
                if (code := _hash(stat[0])) not in seen:
                    seen.add(code)
                    media.write(json.dumps(stat) + "\n")
            group.append(one)
            number += 1
            if one.row.pair and len(group) == 1:
                continue
            if error := first_error(group):
                errors += 1
                faults = [*faults, error][:MAX_LISTED]
                wrong.write(json.dumps(error) + "\n")
            else:
                duplicates += sum(
                    fault.kind == "duplicate" for side in group for fault in side.faults
                )
                table.write(_record(group, int(file.offsets[number - 1]), groups))
            pairs, group = bool(one.row.pair), []
    records = np.fromfile(draft / "samples.bin", ROW)
    np.save(draft / "samples.npy", records)
    (draft / "samples.bin").unlink()
    return {
        "count": len(records) + errors,
        "errors": errors,
        "faults": faults,
        "duplicates": duplicates,
        "groups": list(groups),
        "pairs": pairs,
    }


MAX_LISTED = 5
"""How many faulty samples an error lists."""


def _record(group: Sequence[ValidatedSample], offset: int, groups: dict[str, int]) -> bytes:
    """A `ROW`."""
    row = group[0].row
    return PACKED_ROW.pack(
        offset,
        sum([one.tokens or 0 for one in group]),
        sum([one.images_first_tokens or 0 for one in group]),
        group[0].images or 0,
        groups.setdefault(row.group, len(groups)),
        row.block,
        row.weight,
        hashlib.blake2b(b"".join([one.digest for one in group]), digest_size=16).digest(),
    )


def _opened(folder: Path, key: str) -> Index | None:
    try:
        facts = json.loads((folder / "index.json").read_text("utf-8"))
        if facts.pop("key", None) != key:
            return None
        if any((folder / name).stat().st_size != size for name, size in facts.pop("sizes").items()):
            return None
    except (OSError, ValueError):
        return None
    faults, groups = tuple(facts.pop("faults")), tuple(facts.pop("groups"))
    return Index(folder, faults=faults, groups=groups, **facts)


def changed_media(folder: Path) -> str | None:
    """A local media file of an index that is not what it was when it was decoded."""

    def changed(lines: list[str]) -> str | None:
        for path, *before in map(json.loads, lines):
            if Stat(path, *before) != next(stats(path)):
                return str(path)
        return None

    with (folder / "media.jsonl").open(encoding="utf-8") as file, ThreadPoolExecutor() as pool:
        chunks = iter(lambda: list(islice(file, 4096)), [])
        return next((path for path in pool.map(changed, chunks) if path), None)


def file_stats(paths: Iterable[Path]) -> list[Any]:
    """Name, size and times of files, by which an index knows them again."""
    found: list[Any] = []
    for path in paths:
        url = url_of(path)
        found += remote_files(url) if url else stats(os.fspath(path))
    return found
