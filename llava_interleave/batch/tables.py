"""Columns of tables, and CSV files as people and programs write them."""

from __future__ import annotations

import csv
import re
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..journal import JsonRow
from . import folders
from .webdataset import Embedded

QUESTIONS = ("question", "prompt")
MEDIA = re.compile(r"(image|img|picture|photo|video|clip|media)s?(_?\d+|_\w+)?")
"""Names of fields with a media file or a list of them, in lower case."""
FILES = re.compile(r"(\w+_)?(file_?names?)|(file|path|file_?path|url)s?(_?\d+)?")
"""Names that are media fields where no field of `MEDIA` has a file; `file_name`, `file_names` and
`*_file_name` are those of Hugging Face's ImageFolder.
"""
NOT_MEDIA = re.compile(
    r"[a-z]+_(id|ids|idx|index|width|height|size|count|num|number|format|type|mode|hash|md5|sha\d*|"
    r"labels?|captions?|title|description|text|source|license|date|duration|fps|frames|relation|"
    r"category)"
)
"""Names that begin like those of `MEDIA`, but describe the media."""
LOCATION = re.compile(r"(.+?)_?(path|url|uri|file|name|file_?name|file_?path)s?")
"""Names of the place of a field's file: `image_path` next to `image`."""
DELIMITERS = ",;\t|"


def normalized(row: JsonRow) -> JsonRow:
    """The row with its keys in lower case, without spaces around them; spaces and hyphens within
    become underscores. Raises `DataError` for two keys that become one.
    """
    renamed: JsonRow = {}
    for key, value in row.items():
        name = key if key is None else re.sub(r"[\s-]+", "_", str(key).strip().lower())
        if name in renamed:
            raise DataError(f"two fields are named {name!r} but for case and spaces")
        renamed[name] = value
    return renamed


def media(row: JsonRow) -> list[str | Embedded]:
    """The media files in a normalized row: paths, URLs, or bytes.

    Raises `DataError` for another value, and where only fields with other names hold files.
    """
    if None in row:  # csv.DictReader's key of the cells beyond the header
        raise DataError(
            f"the row has more cells than the header has names: {row[None]}"  # type: ignore[index]
        )
    filled = {key: value for key, value in row.items() if value not in (None, "", [])}
    keys = [key for key in filled if MEDIA.fullmatch(key) and not NOT_MEDIA.fullmatch(key)]
    keys = keys or [key for key in filled if FILES.fullmatch(key)]
    files: list[str | Embedded] = []
    for key in keys:
        place = LOCATION.fullmatch(key)
        if not (place and place[1] in keys):
            value = filled[key]
            files += [_file(key, one) for one in (value if isinstance(value, list) else [value])]
    if not files:
        for key, value in row.items():
            if key not in (*QUESTIONS, "id") and _looks_like_media(value):
                raise DataError(
                    f"{key} holds the file {value!r}, but is not a name of a media field: rename "
                    "it to image, video, images, videos or file_name"
                )
    return files


def _file(key: str, value: Any) -> str | Embedded:
    """A path or URL, or a file in the row itself, as Hugging Face's `datasets` writes it."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return Embedded(str(value.get("path") or ""), value["bytes"])
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return str(value["path"])
    if isinstance(value, bytes):
        return Embedded("", value)
    if not isinstance(value, str | Embedded):
        raise DataError(
            f"{key} is {value!r}; images and videos are strings (paths or URLs), or in a Parquet "
            "file {'bytes', 'path'}"
        )
    return value.strip() if isinstance(value, str) else value


def _looks_like_media(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(one, str) and folders.has_media_suffix(one) for one in values)


def read_csv(path: Path) -> list[JsonRow]:
    """The rows of a CSV file in UTF-8 or UTF-16, separated by commas, semicolons, tabs or bars.

    The header decides: the separator that occurs most often in it outside quotes.
    """
    try:
        data = path.read_bytes()
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        file = StringIO(data.decode("utf-16" if wide else "utf-8-sig"), newline="")
        header = re.sub(r'"[^"]*"', "", file.readline())
        explicit = re.fullmatch(r"sep=(.)\r?\n?", header, re.IGNORECASE)  # a line of Excel
        delimiter = explicit[1] if explicit else max(DELIMITERS, key=header.count)
        file.seek(file.tell() if explicit else 0)
        return list(csv.DictReader(file, delimiter=delimiter, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
