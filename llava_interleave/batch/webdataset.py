"""WebDataset shards: the members of uncompressed tar files, grouped into samples by name. Nothing is unpacked to the disk.

The grouping is that of the package `webdataset` (`tar_file_iterator`, `group_by_keys`): what stands before the first dot of the
last part of a member's name is its key, and neighbours with equal keys are one sample. Names are keys only, never paths.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".ts", ".mts", ".m2ts", ".gif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
KEY = re.compile(r"(?!__[^/]*__/)((?:.*/|)[^.]+)\.([^/]*)", re.DOTALL)
"""Key and suffix of a member's name; what lies below `__name__/` is WebDataset's own."""
MOST, MOST_JSON = 4_000_000_000, 10_000_000
"""Bytes of a member, and of a .json."""


class Member(NamedTuple):
    """Where a file lies."""

    suffix: str
    shard: int
    at: int
    size: int


@dataclass(frozen=True, slots=True)
class Embedded:
    """A file that came within another: its bytes, and a name for its suffix."""

    name: str
    data: bytes


class Shards:
    """The samples of tar files, in order: pictures, videos and one .json of each; other members are not read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Reads the headers. Raises `DataError` for what is no uncompressed tar, or is cut short."""
        self._paths = list(paths)
        self._samples: list[tuple[str, list[Member]]] = []
        state = hashlib.blake2b(digest_size=16)
        for shard, path in enumerate(self._paths):
            last = None
            for key, member, stamp in _members(path, shard):
                state.update(f"{key}.{member} {stamp}".encode("utf-8", "backslashreplace"))
                if key != last:
                    self._samples.append((key, []))
                self._samples[-1][1].append(member)
                last = key
        self.digest = state.hexdigest()
        """Of the members' names, sizes and times."""

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        return self._samples[index][0]

    def row(self, index: int) -> dict[str, Any]:
        """A sample: `id`, `question` where its .json has one, and its files as `images`. Raises `DataError`."""
        key, members = self._samples[index]
        about: Any = {}
        files = []
        for member in members:
            ending = f".{member.suffix}".lower()
            if ending == ".json":
                about = json.loads(self._read(member, MOST_JSON))
            elif ending.endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)):
                files.append(Embedded(ending, self._read(member, MOST)))
        if not isinstance(about, dict) or "messages" in about:
            raise DataError(
                f"the .json of {key} is no object, or has messages; a shard's has a question and perhaps an id"
            )
        return {"id": about.get("id", key), "question": about.get("question"), "images": files}

    def _read(self, member: Member, most: int) -> bytes:
        path = self._paths[member.shard]
        if member.size > most:
            raise DataError(
                f"a .{member.suffix} in {path.name} has {member.size} bytes, the most is {most}"
            )
        with path.open("rb") as file:
            file.seek(member.at)
            data = file.read(member.size)
        if len(data) < member.size:
            raise DataError(f"{path} was cut short while it was read")
        return data


def _members(path: Path, shard: int) -> list[tuple[str, Member, float]]:
    """Key, place and time of every regular file that has a key; links, devices and sparse files are left out."""
    found = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isreg() and not info.issparse() and (match := KEY.fullmatch(info.name)):
                    found.append(
                        (
                            match[1],
                            Member(match[2], shard, info.offset_data, info.size),
                            float(info.mtime),
                        )
                    )
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar file: {error}") from error
    return found
