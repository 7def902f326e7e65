"""Attachments become parts of a message; their content decides between image and video."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import MediaError, PromptError
from ..processing.formats import VIDEO_SUFFIXES, data_url_is_video, is_video
from ..processing.loader import file_path

STILL_SUFFIXES = (".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".heic", ".heif")
"""Suffixes of images that are never animated."""

ContentPart = dict[str, Any]


def part(source: object) -> ContentPart:
    """The message part for a source; a dict is a part already.

    A source is a path, URL, data URL, folder of frames, bytes, PIL image, array or list of frames.
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
    if path.is_dir():
        return {"type": "video", "path": str(path)}
    try:
        with path.open("rb") as file:
            video = is_video(file)
    except OSError as error:
        raise MediaError(f"cannot read {path}: {error.strerror}") from error
    return {"type": "video" if video else "image", "path": str(path)}


def content(question: str, attachments: Sequence[object]) -> list[ContentPart]:
    """The content of a user turn: attachments where `<image>` stands in the question, or before it.

    Without attachments `<image>` is a word of the question. Raises `PromptError` if there are
    attachments, but not as many as the question's `<image>`.
    """
    parts = [part(source) for source in attachments]
    pieces = question.split("<image>") if attachments else [question]
    if len(pieces) == 1:
        return [*parts, {"type": "text", "text": question}]
    if len(pieces) - 1 != len(parts):
        raise PromptError(
            f"the question has {len(pieces) - 1} <image> but {len(parts)} attachments were given"
        )
    turn: list[ContentPart] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for attached, piece in zip(parts, pieces[1:], strict=True):
        turn.append(attached)
        if piece:
            turn.append({"type": "text", "text": piece})
    return turn
