"""A folder of images and videos as rows, each file a row or a named exception."""

from __future__ import annotations

import json
import mimetypes
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import DataError
from ..journal import JsonRow
from ..parquet import Parquet

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
"""Questions for the files of a folder by `file_name`, as in Hugging Face's ImageFolder."""

OTHER_SUFFIXES = (
    ".mpg", ".mpeg", ".vob", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".rm", ".rmvb", ".divx",
    ".jp2", ".j2k", ".jxl", ".jxr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2",
    ".psd", ".tga", ".dds", ".exr", ".hdr", ".svg", ".ico",
)  # fmt: skip
"""Suffixes of images and videos besides those of readable formats and of the module mimetypes."""

Skipped = list[tuple[str, str]]
"""Names of files that are not samples, and why."""


def rows(folder: Path) -> tuple[list[JsonRow], Skipped]:
    """One row per image and video, one per sub-folder with all of its files, in natural order.

    The rows of a metadata file come first; a file that it names has no other row.
    """
    skipped: Skipped = []
    entries = list(_entries(folder, "", skipped))
    metadata = [e for e in entries if e.name.lower() in METADATA]
    skipped += [(e.name, f"{metadata[0].name} is used instead") for e in metadata[1:]]
    described = _metadata(metadata[0]) if metadata else []
    named = {Path(str(name)).as_posix() for row in described for name in _names(row)}
    samples: list[JsonRow] = []
    for entry in entries:
        if entry in metadata:
            continue
        if entry.is_dir():
            inside = [f"{entry.name}/{p.name}" for p in _media(entry, f"{entry.name}/", skipped)]
            files = [name for name in inside if name not in named]
            if not inside:
                skipped.append((f"{entry.name}/", "no images or videos in it"))
            elif files and not (set(inside) & named):
                images = [entry.name] if is_frame_folder(inside) else files
                samples.append({"id": entry.name, "images": images})
            else:
                samples += ({"id": name, "images": [name]} for name in files)
        elif entry.name not in named:
            if is_media_file(entry):
                samples.append({"id": entry.name, "images": [entry.name]})
            else:
                skipped.append((entry.name, "not an image or a video"))
    return described + samples, skipped


def _entries(folder: Path, prefix: str, skipped: Skipped) -> Iterator[Path]:
    for path in sorted(folder.iterdir(), key=natural):
        if path.name.startswith("."):
            skipped.append((prefix + path.name, "hidden"))
        elif not path.is_file() and not path.is_dir():
            skipped.append((prefix + path.name, "neither a file nor a folder"))
        else:
            yield path


def _media(folder: Path, prefix: str, skipped: Skipped) -> Iterator[Path]:
    """The images and videos of a sub-folder."""
    for path in _entries(folder, prefix, skipped):
        if path.is_dir():
            skipped.append((f"{prefix}{path.name}/", "a folder within a sub-folder"))
        elif is_media_file(path):
            yield path
        else:
            skipped.append((prefix + path.name, "not an image or a video"))


def _metadata(path: Path) -> list[JsonRow]:
    from . import tables

    if path.suffix == ".parquet":
        table = list(Parquet(path).rows())
    elif path.suffix == ".jsonl":
        try:
            text = path.read_text("utf-8-sig")
            table = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as JSON lines: {error}") from error
    else:
        table = tables.read_csv(path)
    described = []
    for number, row in enumerate(table, 1):
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {path} is not a JSON object")
        row = tables.normalized(row)
        names = _names(row)
        if not names and "messages" not in row:
            raise DataError(
                f"row {number} of {path} names no file; a field file_name, image or path is needed"
            )
        if row.get("id") in (None, "") and names:
            row["id"] = names[0]
        described.append(row)
    return described


def _names(row: JsonRow) -> list[str]:
    from . import tables

    return [name for name in tables.media(row) if isinstance(name, str)]


def natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts 9.png before 10.png."""
    return [
        (int(piece), "") if piece.isdecimal() else (-1, piece)
        for piece in re.split(r"(\d+)", path.name)
    ]


def has_media_suffix(name: str) -> bool:
    """Whether a name ends like that of an image or a video, of a readable format or not."""
    from ..processing.formats import IMAGE_SUFFIXES, VIDEO_SUFFIXES

    _, dot, ending = name.rpartition(".")
    suffix = dot + ending.lower()
    kind = mimetypes.types_map.get(suffix) or mimetypes.common_types.get(suffix, "")
    known = suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *OTHER_SUFFIXES)
    return known or kind.startswith(("image/", "video/"))


def is_media_file(path: Path) -> bool:
    """Whether a file is an image or a video by its name or its first bytes.

    One that cannot be read counts: its row has the error.
    """
    from ..processing.formats import HEAD, image_format, video_format

    if has_media_suffix(path.name):
        return True
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return False
    return bool(image_format(head) or video_format(head))


def is_video(name: str, data: bytes) -> bool:
    """Whether bytes with a name are a video: by the suffix, else by the content."""
    from ..processing.formats import VIDEO_SUFFIXES
    from ..processing.formats import is_video as by_content

    return name.lower().endswith(VIDEO_SUFFIXES) or by_content(data)


def is_frame_folder(names: Sequence[str]) -> bool:
    """Whether the names of a folder's images number the frames of a video."""
    from ..processing.formats import is_frame_sequence

    return is_frame_sequence(names)
