"""Samples with their images in one file: Parquet and Arrow, as Hugging Face's `datasets` writes
them, and tar files in WebDataset's form. A sample names a place in the file; its bytes are read
when it is used.

A file may be remote, on any file system of fsspec: `s3://bucket/train-*.parquet`, `hf://datasets/`.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from ...errors import DataError, LlavaError, Unsupported
from ...parquet import Arrow, Parquet

BLOCKS = 16
"""Blocks (row groups) whose samples are shuffled together, and that are in memory."""
SUFFIXES = (".parquet", ".arrow", ".tar")
REMOTE = re.compile(r"(?:^|/)([a-z][a-z0-9+]+):/+(.*)$")
FILE = "shard"
"""The key of a place in a file: {"shard": path, ...}."""


def url_of(path: Path | str) -> str | None:
    """The URL in a path (of which `Path` has left one slash); None for a local file."""
    found = REMOTE.search(os.fspath(path))
    if not found:
        return None
    return f"{found[1]}://{'/' * (found[1] == 'file')}{found[2]}"


@contextmanager
def _remote(url: str) -> Iterator[Any]:
    """The fsspec file system of a URL. Raises DataError, Unsupported."""
    try:
        yield url_to_fs(url)[0]
    except LlavaError:
        raise
    except ImportError as error:
        raise Unsupported(f"{url} cannot be read: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{url} cannot be read: {error}") from error


def remote_files(url: str) -> list[tuple[str, Any]]:
    """The URLs of a pattern with `*`, each with its size, tag and time. Raises DataError."""
    scheme = url.partition("://")[0]
    with _remote(url) as system:
        found = sorted(system.glob(url)) if "*" in url else [url]
        infos = [system.info(one) for one in found]
    names = [one if "://" in one else f"{scheme}://{one.lstrip('/')}" for one in found]
    keys = ("size", "ETag", "etag", "sha", "mtime", "created", "LastModified")
    about = [{key: info[key] for key in keys if key in info} for info in infos]
    return list(zip(names, about, strict=True))


def rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The samples of a file, bytes replaced by their places, and the block of each. Raises
    DataError."""
    yield from _tar(path) if path.suffix == ".tar" else _table(path)


def fetch(place: Mapping[str, Any]) -> bytes:
    """The bytes at a place. Raises DataError."""
    path = place[FILE]
    if "offset" in place and (url := url_of(path)):
        with _remote(url) as system:
            end = place["offset"] + place["bytes"]
            return bytes(system.cat_file(url, start=place["offset"], end=end))
    if "offset" in place:
        try:
            with Path(path).open("rb") as file:
                file.seek(place["offset"])
                return file.read(place["bytes"])
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    value = _column(path, place["group"], place["column"])[place["row"]].as_py()
    if place["index"] is not None:
        value = value[place["index"]]
    found = value["bytes"] if isinstance(value, Mapping) else value
    assert isinstance(found, bytes)
    return found


@lru_cache(64)
def _open(path: str) -> Parquet:
    if url := url_of(path):
        with _remote(url) as system:
            if url.endswith(".arrow"):
                raise Unsupported(f"{url}: only a local Arrow file is read; take Parquet")
            return Parquet(url, system.open(url, "rb"))
    return (Arrow if path.endswith(".arrow") else Parquet)(Path(path))


_reading = threading.Lock()
"""pyarrow's files are for one thread at a time."""


@lru_cache(BLOCKS)
def _column(path: str, group: int, column: str) -> Any:
    with _reading:
        return _open(path).read_group(group, [column]).column(0)


def _table(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    name = url_of(path) or str(path.absolute())
    _open.cache_clear()
    _column.cache_clear()
    file = _open(name)
    for number in range(len(file)):
        group, row = file.place(number)
        sample: dict[str, Any] = {}
        for column, value in file.row(number).items():
            place = {FILE: name, "group": group, "row": row, "column": column}
            sample[column] = (
                [_without_bytes(one, {**place, "index": i}) for i, one in enumerate(value)]
                if isinstance(value, list)
                else _without_bytes(value, {**place, "index": None})
            )
        yield sample, zlib.crc32(f"{name}/{group}".encode()) >> 1


def _without_bytes(value: Any, place: dict[str, Any]) -> Any:
    held = value.get("bytes") if isinstance(value, Mapping) and "bytes" in value else value
    return place if isinstance(held, bytes) else value


def _tar(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Files with one name before the first dot are a sample: NAME.json, or NAME.txt, the answer
    about the images, and images, which the JSON may name."""
    name = url_of(path) or str(path.absolute())
    try:
        with (
            _remote(name) if url_of(path) else nullcontext() as system,
            system.open(name, "rb") if system else path.open("rb") as packed,
            tarfile.open(fileobj=packed, mode="r:") as tar,  # not compressed: places are offsets
        ):
            for key, members in groupby(
                (member for member in tar if member.isfile()), lambda m: _split(m.name)[0]
            ):
                texts: dict[str, str] = {}
                places: dict[str, dict[str, Any]] = {}
                for member in members:
                    end = _split(member.name)[1]
                    if end in ("json", "txt"):
                        file = tar.extractfile(member)
                        assert file
                        texts[end] = file.read().decode("utf-8")
                    else:
                        about = {FILE: name, "offset": member.offset_data, "bytes": member.size}
                        places[end] = about
                yield _joined(f"{path.name}/{key}", texts, places), -1
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as tar: {error}") from error


def _split(name: str) -> tuple[str, str]:
    """A member's key and extension, which begins at the first dot of its file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _joined(
    name: str, texts: Mapping[str, str], places: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    if "json" not in texts:
        turns = [
            {"from": "human", "value": "<image>\n" * len(places) + "What is in the picture?"},
            {"from": "gpt", "value": texts.get("txt", "").strip()},
        ]
        return {"id": name, "image": list(places.values()), "conversations": turns}
    try:
        sample = json.loads(texts["json"])
    except ValueError as error:
        raise DataError(f"{name}.json is not JSON: {error}") from error
    if not isinstance(sample, dict):
        raise DataError(f"{name}.json must be an object, a sample")
    key = next((key for key in ("image", "images", "video") if sample.get(key)), "image")
    named = sample.get(key)
    if named is None:
        return {"id": name, **sample, **({key: list(places.values())} if places else {})}
    ends = [
        _split(one)[1] if isinstance(one, str) else "" for one in
        (named if isinstance(named, list) else [named])
    ]  # fmt: skip
    if missing := [end for end in ends if end not in places]:
        raise DataError(f"{name} has no file .{missing[0]}, which its {key} names")
    return {"id": name, **sample, key: [places[end] for end in ends]}
