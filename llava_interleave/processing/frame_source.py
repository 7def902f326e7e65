"""Frames of a camera, a stream, a video file or a growing folder, as they come."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import MediaError
from .formats import IMAGE_SUFFIXES
from .loader import natural
from .video import upright

POLL = 0.2
"""Seconds between two looks at a folder."""
OPEN_TIMEOUT = 10
"""Seconds until a stream that does not answer is an error."""

TimedFrame = tuple[float, Image.Image | Path]
"""Seconds from the first frame on, and the frame."""


def read_frames(source: str, every: float) -> Iterator[TimedFrame]:
    """Frames of a source, at least `every` seconds apart. For commands of the user: it opens
    whatever FFmpeg can.

    source: a video file, of which no frame is left out; a folder, whose image files come in natural
    order, and then new ones; a device or address, or "-" for MJPEG on standard input, of which
    frames that come faster than they are used are left out. Raises `MediaError`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, every)
    if path.is_file():
        return _spaced(_decoded(str(path)), every)
    return _newest(source, every)


def _spaced(frames: Iterator[TimedFrame], every: float) -> Iterator[TimedFrame]:
    after = 0.0
    for at, frame in frames:
        if at >= after:
            yield at, frame
            after = at + every


def _folder(folder: Path, every: float) -> Iterator[TimedFrame]:
    """A file counts once its size is the same at two looks."""
    sizes: dict[Path, int] = {}
    seen: set[Path] = set()
    first: float | None = None
    after = 0.0
    while True:
        try:
            entries = [e for e in os.scandir(folder) if e.name.lower().endswith(IMAGE_SUFFIXES)]
            found = {Path(e.path): e.stat() for e in entries if not e.name.startswith(".")}
        except OSError as error:
            raise MediaError(f"cannot read {folder}: {error.strerror}") from error
        ready = [
            path
            for path, stat in found.items()
            if path not in seen and stat.st_size and sizes.get(path) == stat.st_size
        ]
        for path in sorted(ready, key=lambda path: natural(path.name)):
            seen.add(path)
            first = found[path].st_mtime if first is None else first
            at = max(0.0, found[path].st_mtime - first)
            if at >= after or not every:
                yield at, path
                after = at + every
        seen &= found.keys()  # bounded by the folder
        sizes = {path: stat.st_size for path, stat in found.items()}
        time.sleep(POLL)


def _newest(source: str, every: float) -> Iterator[TimedFrame]:
    """A thread decodes; what is not taken before the next frame is left out."""
    changed = threading.Condition()
    slot: list[TimedFrame] = []
    ended: list[BaseException | None] = []

    def read() -> None:
        error: BaseException | None = None
        began: float | None = None
        try:
            for _, frame in _decoded(source):
                began = time.monotonic() if began is None else began
                with changed:
                    if ended:
                        return
                    slot[:] = [(time.monotonic() - began, frame)]
                    changed.notify()
        except Exception as caught:  # noqa: BLE001  the reader of the frames raises it
            error = caught
        with changed:
            ended.append(error)
            changed.notify()

    threading.Thread(target=read, name="frames", daemon=True).start()
    after = 0.0
    try:
        while True:
            with changed:
                changed.wait_for(lambda: slot or ended)
                if not slot:
                    if ended[0] is not None:
                        raise ended[0]
                    return
                at, frame = slot.pop()
            if at >= after:
                yield at, frame
                after = at + every
    finally:
        with changed:
            ended.append(None)


def _decoded(source: str) -> Iterator[tuple[float, Image.Image]]:
    """All frames with their seconds from the first one on."""
    import av

    try:
        with _opened(source) as container:
            if not container.streams.video:
                raise MediaError(f"{source} has no video")
            first = None
            for number, frame in enumerate(container.decode(video=0)):
                stamp = frame.time if frame.time is not None else float(number)
                first = stamp if first is None else first
                yield max(0.0, stamp - first), upright(frame)
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"cannot read {source}: {error}") from error


@contextmanager
def _opened(source: str) -> Iterator[Any]:
    import av

    if source == "-":
        opened = av.open(sys.stdin.buffer, format="mjpeg")
    elif source.startswith("/dev/video"):
        opened = av.open(source, format="v4l2")
    else:
        opened = av.open(source, timeout=OPEN_TIMEOUT)
    with closing(opened) as container:
        yield container
