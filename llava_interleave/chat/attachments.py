"""What a person attaches becomes a part of a message: images and videos told apart by their first bytes or their name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import MediaError, PromptError
from ..processing.loader import VIDEO_SUFFIXES, video_format

HEAD = 512
"""How many of its first bytes tell what a file is."""

ContentPart = dict[str, Any]


def is_video(head: bytes) -> bool:
    """Whether a file that begins with `head` is a video; a GIF counts as one."""
    return head.startswith(b"GIF8") or video_format(head[:HEAD]) is not None


def part(source: object) -> ContentPart:
    """The message part for a path, URL, data URL, folder of frames, bytes, PIL image, array or list of frames; a dict is one.

    Raises `MediaError` for a file that is missing or something that is no picture.
    """
    if isinstance(source, dict):
        return source
    if isinstance(source, bytes | bytearray):
        kind = "video" if is_video(bytes(source[:HEAD])) else "image"
        return {"type": kind, kind: bytes(source)}
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        if source.startswith("data:"):
            video = source.startswith(("data:video/", "data:image/gif"))
        else:
            video = urlsplit(source).path.lower().endswith((*VIDEO_SUFFIXES, ".gif"))
        return {"type": "video" if video else "image", "url": source}
    if isinstance(source, str | os.PathLike):
        return _file(Path(source).expanduser())
    if isinstance(source, list | tuple) or getattr(source, "ndim", 0) == 4:
        return {"type": "video", "video": list(source)}  # type: ignore[call-overload]
    return {"type": "image", "image": source}


def _file(path: Path) -> ContentPart:
    if path.is_dir():
        return {"type": "video", "path": str(path)}
    try:
        with path.open("rb") as file:
            video = is_video(file.read(HEAD))
    except OSError as error:
        raise MediaError(f"cannot read {path}: {error.strerror}") from error
    return {"type": "video" if video else "image", "path": str(path)}


def content(question: str, attachments: Sequence[object]) -> list[ContentPart]:
    """The content of a user turn: attachments where `<image>` stands in the question, or all of them before it.

    Raises `PromptError` if the question has `<image>`, but not as many as there are attachments.
    """
    parts = [part(source) for source in attachments]
    pieces = question.split("<image>")
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
