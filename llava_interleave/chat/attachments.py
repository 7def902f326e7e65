"""Attachments become parts of a message; their content decides between image and video."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import MediaError, PromptError
from ..processing.formats import (
    IMAGE_SUFFIXES,
    IMAGES,
    VIDEO_SUFFIXES,
    VIDEOS,
    data_url_is_video,
    is_frame_sequence,
    is_video,
)
from ..processing.loader import file_path, natural

STILL_SUFFIXES = (".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".heic", ".heif")
"""Suffixes of images that are never animated."""

SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)

ContentPart = dict[str, Any]


def parts(source: object) -> list[ContentPart]:
    """The message parts for a source: of a folder of photos one per file, else one."""
    if isinstance(source, str | os.PathLike):
        path = file_path(source)
        if path and path.expanduser().is_dir():
            return _folder(path.expanduser())
    return [part(source)]


def part(source: object) -> ContentPart:
    """The message part for a source; a dict is a part already.

    A source is a path, URL, data URL, bytes, PIL image, array or list of frames.
    The content decides whether it is an image or a video, for a URL its suffix, else its content
    when it is fetched; a GIF is a video. Raises `MediaError` for a file that is missing.
    """
    if isinstance(source, dict):
        return source
    if isinstance(source, bytes | bytearray):
        kind = "video" if is_video(bytes(source)) else "image"
        return {"type": kind, kind: bytes(source)}
    if isinstance(source, str) and source[:5].lower() == "data:":
        return {"type": "video" if data_url_is_video(source) else "image", "url": source}
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        path = urlsplit(source).path.lower()
        if path.endswith((*VIDEO_SUFFIXES, ".gif")):
            return {"type": "video", "url": source}
        return {"type": "image" if path.endswith(STILL_SUFFIXES) else "media", "url": source}
    if isinstance(source, str | os.PathLike):
        return _file(file_path(source) or Path(source))
    if isinstance(source, list | tuple) or getattr(source, "ndim", 0) == 4:
        return {"type": "video", "video": list(source)}  # type: ignore[call-overload]
    return {"type": "image", "image": source}


def _file(path: Path) -> ContentPart:
    path = path.expanduser()
    try:
        with path.open("rb") as file:
            video = is_video(file)
    except OSError as error:
        raise MediaError(f"cannot read {path}: {error.strerror}") from error
    return {"type": "video" if video else "image", "path": str(path)}


def _folder(folder: Path) -> list[ContentPart]:
    """A video where the names number its frames, else each image and video, in natural order."""
    media = media_files(folder)
    if is_frame_sequence([path.name for path in media]):
        return [{"type": "video", "path": str(folder)}]
    return [_file(path) for path in media]


def media_files(folder: Path) -> list[Path]:
    """The images and videos of a folder, in natural order.

    Warns of the files that are neither. Raises `MediaError` for a folder without any.
    """
    try:
        files = sorted(folder.iterdir(), key=lambda path: natural(path.name))
    except OSError as error:
        raise MediaError(f"cannot read {folder}: {error.strerror}") from error
    files = [path for path in files if not path.name.startswith(".")]
    media = [path for path in files if path.name.lower().endswith(SUFFIXES) and path.is_file()]
    if not media:
        raise MediaError(f"{folder} holds no images or videos ({IMAGES}, {VIDEOS})")
    if len(media) < len(files):
        others = [path.name for path in files if path not in media]
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        warnings.warn(
            f"llava: {len(others)} of {len(files)} files in {folder} are not attached: {shown}",
            stacklevel=6,
        )
    return media


def content(question: str, attachments: Sequence[object]) -> list[ContentPart]:
    """The content of a user turn: attachments where `<image>` stands in the question, or before it.

    Without attachments `<image>` is a word of the question. An `<image>` stands for an attachment,
    or for one file of a folder. Raises `PromptError` for another number of them.
    """
    groups = [parts(source) for source in attachments]
    media = [item for group in groups for item in group]
    pieces = question.split("<image>") if attachments else [question]
    if len(pieces) == 1:
        return [*media, {"type": "text", "text": question}]
    if len(pieces) - 1 == len(media):
        groups = [[item] for item in media]
    if len(pieces) - 1 != len(groups):
        raise PromptError(
            f"the question has {len(pieces) - 1} <image> but {len(media)} attachments were given"
        )
    turn: list[ContentPart] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for group, piece in zip(groups, pieces[1:], strict=True):
        turn += group
        if piece:
            turn.append({"type": "text", "text": piece})
    return turn
