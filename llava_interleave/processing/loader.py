"""The one module that reads images and videos from outside, within `Limits`.

Its messages are the package's own, never a library's.
"""

from __future__ import annotations

import binascii
import hashlib
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from PIL import AvifImagePlugin, Image, TiffImagePlugin, WebPImagePlugin

from .. import data_url
from ..errors import LlavaError, MediaError, MediaRefused
from .fetch import fetch
from .formats import (
    HEAD,
    IMAGE_SUFFIXES,
    IMAGES,
    VIDEO_SUFFIXES,
    VIDEOS,
    image_format,
    is_video,
    video_format,
)
from .images import from_array, orientation, to_rgb
from .limits import BYTE_LIMITS, Deadline, Limits, PixelBudget, PixelGate, check_length
from .segments import check_scans, check_segments, is_whole, plain_jpeg
from .video import Clip, Each, FrameSampling, FrameTimeline, read_video
from .webp import release_interpreter

T = TypeVar("T")
FRAME_FOLDER_FPS = 2
"""Frames a second of a folder or a list of frames, as in the training data's frame folders."""
REDUCED_IMAGE, DNG_VERSION = 254, 50706
"""TIFF tags of camera raw files: of a first image that is only a preview, and of Adobe's DNG."""
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError,
    MemoryError, AttributeError, RuntimeError, AssertionError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""Exceptions of Pillow's decoders for damaged files."""


@dataclass(frozen=True, slots=True)
class Download:
    """A URL and its bytes: a source that is read several times but downloaded once."""

    url: str
    file: BinaryIO


class Loader:
    """Images and videos from paths, URLs, data URLs, bytes, PIL images and arrays. Thread-safe."""

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008  frozen
        self.limits = limits
        self._gate = PixelGate(limits.decoding_pixels)

    def image(self, source: object, budget: PixelBudget | None = None) -> Image.Image:
        """The image as RGB, by the rules of `images.to_rgb`.

        Raises MediaError or MediaRefused, naming the source.
        """
        return self.fitted(source, lambda image: image, budget)

    def fitted(
        self, source: object, fit: Callable[[Image.Image], T], budget: PixelBudget | None = None
    ) -> T:
        """What `fit` makes of `image`, which counts as decoded until then."""
        with _naming(source), self._image(source) as image, self._gate.room(image.size):
            if budget:
                budget.take(image.size)
            image.load()
            self.limits.check_size(*image.size)  # a GIF's frames may outgrow its header
            return fit(to_rgb(image))

    def image_size(self, source: object) -> tuple[int, int]:
        """Width and height of `image`'s result, from the header."""
        with _naming(source), self._image(source) as image:
            # Pillow's size of a TIFF that is not decoded yet is already the turned one.
            turned = image.format != "TIFF" and orientation(image) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size

    def fingerprint(self, source: object) -> bytes:
        """A hash of an image file's bytes, or of the pixels of an image in memory, 16 bytes.

        Raises MediaError as `image` does, but a file that is seen to be whole is not decoded.
        """
        state = hashlib.blake2b(digest_size=16)
        if isinstance(source, Image.Image) or hasattr(source, "shape"):
            image = self.image(source)
            state.update(repr(image.size).encode() + image.tobytes())
            return state.digest()
        with _naming(source):
            with self._open(source, self.limits.image_bytes, buffering=0) as file:
                data = file.read()
            if size := plain_jpeg(data) if data.startswith(b"\xff\xd8\xff") else None:
                self.limits.check_size(*size)
                return hashlib.blake2b(data, digest_size=16).digest()
            with _guarding("the image is damaged or cut short"), self._image(data) as image:
                if not is_whole(data, image.format or ""):
                    image.load()
                    to_rgb(image)
        state.update(data)
        return state.digest()

    def video(
        self,
        source: object,
        sampling: FrameSampling = FrameSampling(),  # noqa: B008  frozen
        budget: PixelBudget | None = None,
        each: Each | None = None,
    ) -> Clip:
        """Frames as RGB, of a video, an animation, a folder of images or a list of them."""

        def keep(frame: Image.Image) -> Image.Image:
            if budget:
                budget.take(frame.size)
            return each(frame) if each else frame

        return self._video(source, sampling, keep)

    def video_times(self, source: object, sampling: FrameSampling = FrameSampling()) -> Clip:  # noqa: B008  frozen
        """The result of `video` without the frames: nothing of a video file is decoded."""
        return self._video(source, sampling, None)

    def resolve(self, source: object, animations: bool = False) -> tuple[bool, object]:
        """Whether a source without a type is a video, and the source, a URL's bytes with it.

        Lists, folders and names with a known suffix decide without being read; else the first bytes
        do. animations: an animated image is a video, not an image.
        """
        if isinstance(source, list | tuple) or getattr(source, "ndim", 0) == 4:
            return True, source
        if isinstance(source, Image.Image) or hasattr(source, "shape"):
            return False, source
        with _naming(source):
            if isinstance(source, str | os.PathLike):
                path = file_path(source)
                name = os.fspath(path) if path else urlsplit(str(source)).path
                if path or str(source)[:5].lower() != "data:":
                    if name.lower().endswith(VIDEO_SUFFIXES):
                        return True, source
                    if name.lower().endswith(IMAGE_SUFFIXES) and not animations:
                        return False, source
                if path and self._locate(path).is_dir():
                    return True, source
                if path is None and str(source)[:5].lower() != "data:":
                    self._check_remote()
                    source = Download(
                        str(source), fetch(str(source), self.limits.video_bytes, self.limits)
                    )
            with self._open(source, self.limits.video_bytes) as file:
                if animations:
                    return is_video(file), source
                return video_format(file.read(HEAD)) is not None, source

    @contextmanager
    def _image(self, source: object) -> Iterator[Image.Image]:
        """An image whose header passed the limits, not decoded yet unless it came decoded."""
        with _guarding("the image is damaged or cut short"):
            if isinstance(source, Image.Image):
                self.limits.check_size(*source.size)
                yield source
            elif hasattr(source, "shape"):
                image = from_array(source)
                self.limits.check_size(*image.size)
                yield image
            else:
                with self._open(source, self.limits.image_bytes) as file:
                    head = file.read(HEAD)
                    kind = image_format(head)
                    if kind is None and video_format(head):
                        raise MediaError("this is a video, not an image; give it as a video")
                    if kind is None:
                        raise MediaError(f"not an image in a known format ({IMAGES})")
                    with _open_image(file, kind) as image:
                        self.limits.check_size(*image.size)
                        if kind == "JPEG":
                            check_scans(file, image.width, image.height)
                        yield image

    def _video(self, source: object, sampling: FrameSampling, each: Each | None) -> Clip:
        with _naming(source):
            if getattr(source, "ndim", 0) == 4:
                source = list(source)  # type: ignore[call-overload]
            if isinstance(source, list | tuple):
                return self._frame_list(source, sampling, each)
            if (
                isinstance(source, str | os.PathLike)
                and (path := file_path(source))
                and self._locate(path).is_dir()
            ):
                return self._frame_list(self._folder(self._locate(path)), sampling, each)
            if isinstance(source, Image.Image):
                raise MediaError("one image is not a video; pass a list of images")
            with self._open(source, self.limits.video_bytes) as file:
                head = file.read(HEAD)
                file.seek(0)
                kind = image_format(head)
                if kind in ("GIF", "WEBP") or (kind and is_video(file)):
                    with _guarding("the animation is damaged or cut short"):
                        return self._animation(file, kind, sampling, each)
                if kind is not None:
                    raise MediaError("this is an image, not a video; give it as an image")
                if (container := video_format(head)) is None:
                    raise MediaError(f"not a video in a known format ({VIDEOS})")
                return read_video(file, container, sampling, self.limits, each)

    def _frame_list(
        self, sources: Sequence[object], sampling: FrameSampling, each: Each | None
    ) -> Clip:
        if not sources:
            raise MediaError("a video needs at least one frame")
        timeline = FrameTimeline(range(len(sources)), Fraction(1, FRAME_FOLDER_FPS))
        chosen = sampling.choose(timeline, self.limits.video_frames)
        frames = [each(self.image(sources[i])) for i in chosen] if each else []
        return Clip(frames, [float(timeline.time(i)) for i in chosen], timeline.duration)

    def _folder(self, folder: Path) -> list[Path]:
        """The images of a folder in natural order: 2.png before 10.png.

        Below a `media_root` they are relative to it.
        """
        with _guarding("the folder cannot be read"):
            files = [
                p
                for p in folder.iterdir()
                if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
            ]
        if not files:
            raise MediaError(f"the folder holds no images ({IMAGES})")
        if self.limits.media_root is not None:
            files = [p.relative_to(self.limits.media_root.resolve()) for p in files]
        return sorted(files, key=lambda p: natural(p.name))

    def _animation(
        self, file: BinaryIO, kind: str, sampling: FrameSampling, each: Each | None
    ) -> Clip:
        deadline = Deadline(
            self.limits.video_work_seconds, "reading the animation", "video_work_seconds"
        )
        with _open_image(file, kind) as image:
            self.limits.check_size(*image.size)
            # The default image of an APNG may stand outside its animation.
            first = 1 if image.info.get("default_image") else 0
            stamps = [0]
            for _ in _frames(image, first):
                deadline.left()
                if len(stamps) > self.limits.decoded_frames:
                    raise MediaError(
                        f"the animation has more than the limit of {self.limits.decoded_frames} "
                        "frames (Limits.decoded_frames)"
                    )
                stamps.append(stamps[-1] + _microseconds(image))
            if len(stamps) == 1:
                raise MediaError("the animation has no frame")
            timeline = FrameTimeline(stamps[:-1], Fraction(1, 1_000_000))
            duration = stamps[-1] / 1_000_000
            if duration > self.limits.video_seconds:
                raise MediaError(
                    f"the animation lasts {duration:.0f} s, the limit is "
                    f"{self.limits.video_seconds:g} s (Limits.video_seconds)"
                )
            chosen = sampling.choose(timeline, self.limits.video_frames)
            frames = []
            if each:
                wanted = set(chosen)
                for index, _ in zip(range(chosen[-1] + 1), _frames(image, first), strict=False):
                    deadline.left()
                    if index in wanted:
                        self.limits.check_size(*image.size)
                        frames.append(each(to_rgb(image.copy())))
        return Clip(frames, [float(timeline.time(i)) for i in chosen], duration)

    @contextmanager
    def _open(self, source: object, max_bytes: int, buffering: int = -1) -> Iterator[BinaryIO]:
        """The bytes of a source, at most `max_bytes`. buffering: of a local file, as of `open`."""
        if isinstance(source, Download):
            _check_bytes(source.file.seek(0, os.SEEK_END), max_bytes)
            source.file.seek(0)
            yield source.file
            return
        if isinstance(source, bytes | bytearray | memoryview):
            _check_bytes(memoryview(source).nbytes, max_bytes)
            file: BinaryIO = BytesIO(bytes(source))
        elif isinstance(source, str | os.PathLike):
            path = file_path(source)
            if path is not None:
                file = self._open_file(path, max_bytes, buffering)
            elif str(source)[:5].lower() == "data:":
                file = BytesIO(_data_url(str(source), max_bytes))
            else:
                self._check_remote()
                file = fetch(str(source), max_bytes, self.limits)
        else:
            raise MediaError(
                f"{type(source).__name__} is not a source of media: pass a path, URL, data URL, "
                "bytes, PIL image or array"
            )
        with file:
            yield file

    def _check_remote(self) -> None:
        if not self.limits.allow_remote:
            raise MediaRefused(
                "URLs may not be fetched here; send the file itself (bytes or a data: URL)"
            )

    def _locate(self, path: Path) -> Path:
        """The path with symbolic links resolved. Raises MediaRefused where that is not allowed."""
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

    def _open_file(self, path: Path, max_bytes: int, buffering: int = -1) -> BinaryIO:
        """A regular file, opened to be read."""
        real = self._locate(path)
        flags = (
            os.O_RDONLY
            | getattr(os, "O_NONBLOCK", 0)
            | getattr(os, "O_CLOEXEC", 0)
            | getattr(os, "O_BINARY", 0)
        )
        if self.limits.media_root is not None:
            # `real` has no links: one that appeared since is not followed.
            flags |= getattr(os, "O_NOFOLLOW", 0)
        try:
            number = os.open(real, flags)
        except FileNotFoundError as error:
            raise MediaError("there is no such file") from error
        except (OSError, ValueError) as error:
            raise MediaError("the file cannot be opened") from error
        try:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode):
                raise MediaRefused("not a regular file")
            _check_bytes(status.st_size, max_bytes)
        except LlavaError:
            os.close(number)
            raise
        return os.fdopen(number, "rb", buffering)


def name_of(source: object) -> str:
    """A short name of a source for messages and tables: no query of a URL, no data."""
    if isinstance(source, Download):
        source = source.url
    if isinstance(source, str | os.PathLike):
        text = str(source)
        scheme = _scheme(text)
        text = (
            "data URL" if scheme.startswith("data:") else text.partition("?")[0] if scheme else text
        )
        if not text.isprintable():
            text = "".join(c if c.isprintable() else "?" for c in text)
        return text if len(text) <= 120 else f"{text[:50]}...{text[-50:]}"
    if isinstance(source, list | tuple):
        return f"list of {len(source)} frames"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source):,} bytes"
    return "image in memory"


def _open_image(file: BinaryIO, kind: str) -> Image.Image:
    """A file as Pillow's image of a format that its first bytes announce, not decoded yet."""
    check_segments(file, kind)
    if kind == "HEIF":
        try:
            from pillow_heif.as_plugin import HeifImageFile
        except ImportError as error:
            raise MediaError(
                "HEIC and HEIF images need pillow-heif: pip install 'llava-interleave[heif]'"
            ) from error
        return HeifImageFile(file)  # type: ignore[no-untyped-call]
    if kind == "AVIF":  # by its class: `Image.open` looks at the major brand alone
        return AvifImagePlugin.AvifImageFile(file)
    image = Image.open(file, formats=[kind])
    if isinstance(image, WebPImagePlugin.WebPImageFile):
        file.seek(0)
        release_interpreter(image, file.read())
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        if DNG_VERSION in tags or int(tags.get(REDUCED_IMAGE) or 0) & 1:
            raise MediaError(
                "this is a camera's raw file, of which only a preview could be read; "
                "develop it to JPEG or TIFF first"
            )
    return image


@contextmanager
def _guarding(message: str) -> Iterator[None]:
    """Turn a decoder's exception for damaged input into a MediaError with `message`."""
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


def _frames(image: Image.Image, first: int) -> Iterator[None]:
    """Decode an animation frame by frame, each into `image`."""
    index = first
    with suppress(EOFError):
        while True:
            image.seek(index)
            image.load()
            yield
            index += 1


def _microseconds(image: Image.Image) -> int:
    """How long the current frame of an animation is shown.

    As in FFmpeg and browsers 0.1 s where the file has 0, in a GIF also where it has 0.01 s.
    """
    milliseconds = float(image.info.get("duration") or 0)
    shortest = 20 if image.format == "GIF" else 0
    return round(milliseconds * 1000) if milliseconds > 0 and milliseconds >= shortest else 100_000


def _scheme(text: str) -> str:
    """The beginning of a URL with its scheme, in lower case; "" for a path."""
    return (
        text[:64].lower()
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:|file:", text, re.IGNORECASE)
        else ""
    )


def file_path(source: str | os.PathLike[str]) -> Path | None:
    """The path of a source that is a path or a file:// URL; None for other URLs.

    Raises MediaError as `check_length` does.
    """
    if isinstance(source, Path):
        return source
    if not isinstance(source, str):
        return Path(source)
    scheme = _scheme(source)
    if not scheme.startswith("data:"):
        check_length(source)
    if not scheme:
        return Path(source)
    if not scheme.startswith("file:"):
        return None
    return Path(_file_url_path(source, windows=os.name == "nt"))


def _file_url_path(url: str, windows: bool) -> str:
    """The path of a file:// URL; on Windows that of `file:///C:/a` and `file://C:/a` is C:/a."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    if windows:
        if re.fullmatch(r"[A-Za-z][:|]?", parts.netloc):
            return f"{parts.netloc[0]}:{path}"
        if drive := re.match(r"/([A-Za-z])[:|](?=/|$)", path):
            path = f"{drive[1]}:{path[3:]}"
    if parts.netloc not in ("", "localhost"):
        raise MediaRefused("a file:// URL may not name another machine")
    return path


def _data_url(url: str, max_bytes: int) -> bytes:
    try:
        length = len(url) * 3 // 4
        if length > 2 * max_bytes:  # with white space or percent-encoding
            raise MediaError(
                f"about {length:,} bytes are more than the limit of {max_bytes:,} bytes "
                f"({BYTE_LIMITS})"
            )
        data = data_url.decode(url)
    except binascii.Error as error:
        raise MediaError("the base64 of the data is damaged") from error
    except ValueError as error:
        raise MediaError(str(error)) from None
    _check_bytes(len(data), max_bytes)
    return data


def _check_bytes(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MediaError(
            f"{size:,} bytes are more than the limit of {max_bytes:,} bytes ({BYTE_LIMITS})"
        )


def natural(name: str) -> list[Any]:
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
    ]
