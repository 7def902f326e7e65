"""The one place that reads images and videos from outside, within `Limits`. Messages are ours, never a library's."""

from __future__ import annotations

import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from PIL import Image

from .. import data_url
from ..errors import LlavaError, MediaError, MediaRefused
from .fetch import fetch
from .images import ORIENTATION, from_array, to_rgb
from .limits import Deadline, Limits, PixelBudget
from .video import Clip, Each, FrameSampling, FrameTimeline, read_video

IMAGES = "JPEG, PNG, WEBP, GIF or BMP"
VIDEOS = "MP4/MOV, WEBM/MKV, AVI, MPEG-TS, animated GIF or WEBP"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".ts", ".mts", ".m2ts")
MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"pnot")
STILLS_RATE = 2
"""Frames a second that a folder or list of frames counts as: what the frame folders of the training data were cut at."""
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, MemoryError, AttributeError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow's decoders raise on damaged files."""


class Loader:
    """Images and videos from paths, URLs, data URLs, bytes, PIL images and arrays. Safe to share between threads."""

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008  frozen
        self.limits = limits

    def image(self, source: object, budget: PixelBudget | None = None) -> Image.Image:
        """The picture as RGB, by the rules of `images.to_rgb`. Raises MediaError or MediaRefused, naming the source."""
        with _naming(source), self._picture(source) as picture:
            if budget:
                budget.take(picture.size)
            picture.load()
            self.limits.check_size(*picture.size)  # a GIF's frames may outgrow its header
            return to_rgb(picture)

    def image_size(self, source: object) -> tuple[int, int]:
        """Width and height as `image` would return them, from the header."""
        with _naming(source), self._picture(source) as picture:
            turned = picture.getexif().get(ORIENTATION) in (5, 6, 7, 8)
            return picture.size[::-1] if turned else picture.size

    def video(
        self,
        source: object,
        sampling: FrameSampling = FrameSampling(),  # noqa: B008  frozen
        budget: PixelBudget | None = None,
        each: Each | None = None,
    ) -> Clip:
        """Frames as RGB, of a film, an animated GIF or WEBP, a folder of pictures or a list of them."""

        def keep(frame: Image.Image) -> Image.Image:
            if budget:
                budget.take(frame.size)
            return each(frame) if each else frame

        return self._video(source, sampling, keep)

    def video_times(self, source: object, sampling: FrameSampling = FrameSampling()) -> Clip:  # noqa: B008  frozen
        """What `video` would return, without the frames: of a film nothing is decoded."""
        return self._video(source, sampling, None)

    def is_video(self, source: object) -> bool:
        """Whether a source given without a type is a video: a list, a folder, or a name that ends like a film's."""
        if isinstance(source, list | tuple) or getattr(source, "ndim", 0) == 4:
            return True
        if isinstance(source, bytes):
            return video_format(source[:512]) is not None
        if not isinstance(source, str | os.PathLike):
            return False
        text = os.fspath(source)
        if (
            isinstance(text, str)
            and (scheme := _scheme(text))
            and not isinstance(source, os.PathLike)
        ):
            return scheme.startswith("data:video/") or urlsplit(text).path.lower().endswith(
                VIDEO_SUFFIXES
            )
        return str(text).lower().endswith(VIDEO_SUFFIXES) or (
            self.limits.allow_local_files and self._locate(Path(source)).is_dir()
        )

    @contextmanager
    def _picture(self, source: object) -> Iterator[Image.Image]:
        """A picture whose header passed the limits, not decoded yet unless it came decoded."""
        with _guarding("the picture is damaged or cut short"):
            if isinstance(source, Image.Image):
                self.limits.check_size(*source.size)
                yield source
            elif hasattr(source, "shape"):
                picture = from_array(source)
                self.limits.check_size(*picture.size)
                yield picture
            else:
                with self._open(source, self.limits.image_bytes) as file:
                    kind = image_format(file.read(16))
                    file.seek(0)
                    if kind is None:
                        raise MediaError(f"not a picture in a known format ({IMAGES})")
                    with Image.open(file, formats=[kind]) as picture:
                        self.limits.check_size(*picture.size)
                        yield picture

    def _video(self, source: object, sampling: FrameSampling, each: Each | None) -> Clip:
        with _naming(source):
            if getattr(source, "ndim", 0) == 4:
                source = list(source)  # type: ignore[call-overload]
            if isinstance(source, list | tuple):
                return self._stills(source, sampling, each)
            if (
                isinstance(source, str | os.PathLike)
                and (path := _as_path(source))
                and self._locate(path).is_dir()
            ):
                return self._stills(self._folder(self._locate(path)), sampling, each)
            if isinstance(source, Image.Image):
                raise MediaError("one picture is not a video; pass a list of pictures")
            with self._open(source, self.limits.video_bytes) as file:
                head = file.read(512)
                file.seek(0)
                if (still := image_format(head)) in ("GIF", "WEBP"):
                    with _guarding("the animation is damaged or cut short"):
                        return self._animation(file, still, sampling, each)
                if (kind := video_format(head)) is None:
                    raise MediaError(f"not a video in a known format ({VIDEOS})")
                return read_video(file, kind, sampling, self.limits, each)

    def _stills(
        self, sources: Sequence[object], sampling: FrameSampling, each: Each | None
    ) -> Clip:
        if not sources:
            raise MediaError("a video needs at least one frame")
        clock = FrameTimeline(range(len(sources)), Fraction(1, STILLS_RATE))
        chosen = sampling.choose(clock, self.limits.video_frames)
        frames = [each(self.image(sources[i])) for i in chosen] if each else []
        return Clip(frames, [float(clock.time(i)) for i in chosen], clock.duration)

    def _folder(self, folder: Path) -> list[Path]:
        """The pictures of a folder in natural order: 2.png before 10.png. Below a `media_root` as they are known there."""
        with _guarding("the folder cannot be read"):
            files = [
                p
                for p in folder.iterdir()
                if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
            ]
        if not files:
            raise MediaError(f"the folder holds no pictures ({IMAGES})")
        if self.limits.media_root is not None:
            files = [p.relative_to(self.limits.media_root.resolve()) for p in files]
        return sorted(files, key=lambda p: _natural(p.name))

    def _animation(
        self, file: BinaryIO, kind: str, sampling: FrameSampling, each: Each | None
    ) -> Clip:
        deadline = Deadline(self.limits.video_work_seconds, "reading the animation")
        with Image.open(file, formats=[kind]) as picture:
            self.limits.check_size(*picture.size)
            stamps = [0]
            for _ in _frames(picture):
                deadline.left()
                if len(stamps) > self.limits.decoded_frames:
                    raise MediaError(
                        f"the animation has more than the limit of {self.limits.decoded_frames} frames"
                    )
                # Browsers show frames of no duration for a tenth of a second.
                stamps.append(stamps[-1] + (int(picture.info.get("duration") or 0) or 100))
            clock = FrameTimeline(stamps[:-1], Fraction(1, 1000))
            if stamps[-1] > self.limits.video_seconds * 1000:
                raise MediaError(
                    f"the animation lasts {stamps[-1] / 1000:.0f} s, the limit is {self.limits.video_seconds:g} s"
                )
            chosen = sampling.choose(clock, self.limits.video_frames)
            frames = []
            if each:
                for index in _frames(picture):
                    deadline.left()
                    if index in chosen:
                        self.limits.check_size(*picture.size)
                        frames.append(each(to_rgb(picture.copy())))
        return Clip(frames, [float(clock.time(i)) for i in chosen], stamps[-1] / 1000)

    @contextmanager
    def _open(self, source: object, most: int) -> Iterator[BinaryIO]:
        """The bytes of a source, at most `most`."""
        if isinstance(source, bytes | bytearray | memoryview):
            file: BinaryIO = BytesIO(_at_most(bytes(source), most))
        elif isinstance(source, str | os.PathLike):
            path = _as_path(source)
            if path is not None:
                file = self._open_file(path, most)
            elif str(source)[:5].lower() == "data:":
                file = BytesIO(_data_url(str(source), most))
            elif not self.limits.allow_remote:
                raise MediaRefused(
                    "URLs may not be fetched here; send the file itself (bytes or a data: URL)"
                )
            else:
                file = fetch(str(source), most, self.limits)
        else:
            raise MediaError(
                f"{type(source).__name__} is not a source of media: pass a path, URL, data URL, bytes, PIL image or array"
            )
        with file:
            yield file

    def _locate(self, path: Path) -> Path:
        """Where a path leads, symbolic links followed. Raises MediaRefused where that is not allowed."""
        if not self.limits.allow_local_files:
            raise MediaRefused(
                "local files may not be read here; send the file itself (bytes or a data: URL)"
            )
        if self.limits.media_root is None:
            return path
        root = self.limits.media_root.resolve()
        with _guarding("the path leads nowhere"):
            real = (root / path).resolve()
        if not real.is_relative_to(root):
            raise MediaRefused("the path leads out of the folder that media may be read from")
        return real

    def _open_file(self, path: Path, most: int) -> BinaryIO:
        real = self._locate(path)
        flags = (
            os.O_RDONLY
            | getattr(os, "O_NONBLOCK", 0)
            | getattr(os, "O_CLOEXEC", 0)
            | getattr(os, "O_BINARY", 0)
        )
        if self.limits.media_root is not None:
            flags |= getattr(
                os, "O_NOFOLLOW", 0
            )  # `real` has no links left: one that appeared since is not followed
        try:
            number = os.open(real, flags)
        except FileNotFoundError as error:
            raise MediaError("there is no such file") from error
        except (OSError, ValueError) as error:
            raise MediaError("the file cannot be opened") from error
        file = os.fdopen(number, "rb")
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            file.close()
            raise MediaRefused("not a regular file")
        if status.st_size > most:
            file.close()
            raise MediaError(f"{status.st_size:,} bytes are more than the limit of {most:,} bytes")
        return file


def name_of(source: object) -> str:
    """A short name of a source for messages and tables: no query of a URL, no data."""
    if isinstance(source, str | os.PathLike):
        text = str(source)
        scheme = _scheme(text)
        text = (
            "data URL" if scheme.startswith("data:") else text.partition("?")[0] if scheme else text
        )
        text = "".join(c if c.isprintable() else "?" for c in text)
        return text if len(text) <= 120 else f"{text[:50]}...{text[-50:]}"
    if isinstance(source, list | tuple):
        return f"list of {len(source)} frames"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source):,} bytes"
    return "picture in memory"


@contextmanager
def _guarding(message: str) -> Iterator[None]:
    """Turn what decoders raise on damaged input into a MediaError with a message of our own."""
    try:
        yield
    except LlavaError:
        raise
    except BROKEN as error:
        raise MediaError(message) from error


@contextmanager
def _naming(source: object) -> Iterator[None]:
    try:
        yield
    except LlavaError as error:
        name = name_of(source)
        raise error if str(error).startswith(name) else type(error)(f"{name}: {error}") from error


def _frames(picture: Image.Image) -> Iterator[int]:
    """Decode an animation frame by frame; yields the index of the frame that `picture` now shows."""
    index = 0
    with suppress(EOFError):
        while True:
            picture.seek(index)
            picture.load()
            yield index
            index += 1


def _scheme(text: str) -> str:
    """The scheme and what follows of something that is a URL, in lower case; "" for a path."""
    return (
        text[:64].lower()
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:|file:", text, re.IGNORECASE)
        else ""
    )


def _as_path(source: str | os.PathLike[str]) -> Path | None:
    """The path that a source names, plainly or as a file:// URL; None for other URLs."""
    if not isinstance(source, str):
        return Path(source)
    scheme = _scheme(source)
    if not scheme:
        return Path(source)
    if not scheme.startswith("file:"):
        return None
    parts = urlsplit(source)
    if parts.netloc not in ("", "localhost"):
        raise MediaRefused("a file:// URL may not name another machine")
    return Path(unquote(parts.path))


def _data_url(url: str, most: int) -> bytes:
    try:
        data = data_url.payload(url)
    except ValueError as error:
        raise MediaError(str(error)) from None
    if len(data) * 3 // 4 > most + 3:
        raise MediaError(
            f"about {len(data) * 3 // 4:,} bytes are more than the limit of {most:,} bytes"
        )
    try:
        decoded = data_url.decode(url)
    except ValueError as error:
        raise MediaError("the base64 of the data is damaged") from error
    return _at_most(decoded, most)


def _at_most(data: bytes, most: int) -> bytes:
    if len(data) > most:
        raise MediaError(f"{len(data):,} bytes are more than the limit of {most:,} bytes")
    return data


def image_format(head: bytes) -> str | None:
    """Pillow's name of the format that a file's first bytes announce."""
    for magic, kind in (
        (b"\xff\xd8\xff", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"GIF87a", "GIF"),
        (b"GIF89a", "GIF"),
    ):
        if head.startswith(magic):
            return kind
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    return "BMP" if head.startswith(b"BM") else None


def video_format(head: bytes) -> str | None:
    """FFmpeg's name of the format that a file's first 512 bytes announce."""
    if head[4:8] in MOV_BOXES:
        return "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    if len(head) == 512 and any(
        head[at] == head[at + step] == 0x47 for at, step in ((0, 188), (4, 192))
    ):
        return "mpegts"
    return None


def _natural(name: str) -> list[Any]:
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
    ]
