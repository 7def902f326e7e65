"""How much of an image or a video is read, and from where."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Condition, Lock

from ..errors import MediaError, OptionError

PILLOW_MAX_PIXELS = 178_956_970
"""Pixels above which Pillow itself refuses an image; that global is not changed."""

BYTE_LIMITS = "Limits.image_bytes of images, Limits.video_bytes of videos"
"""The names in messages where both limits apply."""

HOST_PATTERN = re.compile(r"(\*|(\*\.)?[A-Za-z0-9_][A-Za-z0-9._-]*)(:[0-9]{1,5})?")


MAX_URL = 16_384
"""Characters of a path or URL: `Path` makes a string of each part, `urlsplit` keeps the last 128
URLs."""


def check_length(url: str) -> None:
    """Raises MediaError for a path or URL that is too long to be one."""
    if len(url) > MAX_URL:
        raise MediaError(
            f"a path or URL of {len(url):,} characters is longer than the limit of {MAX_URL:,}"
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of all media. The defaults are for a person's own machine; a server sets tighter ones.

    allow_local_files: paths and file:// URLs may be read.
    media_root: only files below this folder may be read, and relative paths begin there.
    allow_remote: http and https URLs may be fetched.
    remote_hosts: the hosts that URLs, redirects included, may lead to: names, `*.example.com` for
        all below it, or `*`, with `:port` where it is not that of the scheme; None for all.
    allow_private: URLs may lead to addresses that are not public: this machine, the local network.
    image_bytes: maximum bytes of an image, as a file, a download or decoded from base64.
    video_bytes: maximum bytes of a video.
    image_pixels: maximum pixels of an image or a video frame, checked in its header before
        decoding.
    side_ratio: maximum ratio of the longer side to the shorter one.
    prompt_media: maximum number of images and videos of one prompt.
    prompt_pixels: maximum pixels decoded for one prompt.
    prompt_frames: maximum number of images and video frames of one prompt.
    decoding_pixels: pixels of images decoded at a time by all threads; a larger one is alone.
    video_seconds: the longest video, in seconds.
    video_packets: maximum number of compressed frames in one video.
    video_frames: maximum number of frames sampled from one video.
    decoded_frames: maximum number of frames decoded to reach those.
    video_work_seconds: wall-clock seconds that reading one video may take.
    download_seconds: wall-clock seconds that one download may take, redirects included.
    redirects: maximum number of redirects followed for one download.
    """

    allow_local_files: bool = True
    media_root: Path | None = None
    allow_remote: bool = True
    remote_hosts: tuple[str, ...] | None = None
    allow_private: bool = False
    image_bytes: int = 100_000_000
    video_bytes: int = 4_000_000_000
    image_pixels: int = 64_000_000
    side_ratio: float = 200.0
    prompt_media: int = 256
    prompt_pixels: int = 4_000_000_000
    prompt_frames: int = 4096
    decoding_pixels: int = 1_000_000_000
    video_seconds: float = 6 * 3600.0
    video_packets: int = 1_500_000
    video_frames: int = 256
    decoded_frames: int = 50_000
    video_work_seconds: float = 300.0
    download_seconds: float = 60.0
    redirects: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and not (value > 0 or field.name == "redirects")
            ):
                raise OptionError(f"the limit {field.name} must be above 0, not {value!r}")
        for pattern in self.remote_hosts or ():
            if not HOST_PATTERN.fullmatch(pattern):
                raise OptionError(
                    f"{pattern!r} is not a host; write images.example.com, *.example.com or *, "
                    "with :port if need be"
                )
        if self.image_pixels > PILLOW_MAX_PIXELS:
            raise OptionError(
                f"image_pixels can be at most {PILLOW_MAX_PIXELS:,}, not {self.image_pixels:,}"
            )

    def check_size(self, width: int, height: int) -> None:
        """Raise MediaError for an image whose header has more than the limits allow."""
        if width < 1 or height < 1:
            raise MediaError(f"an image of {width} x {height} pixels is empty")
        if width * height > self.image_pixels:
            raise MediaError(
                f"{width} x {height} pixels are more than the limit of {self.image_pixels:,} "
                "pixels (--image-megapixels, Limits.image_pixels)"
            )
        if max(width, height) > self.side_ratio * min(width, height):
            raise MediaError(
                f"{width} x {height} pixels: one side may be at most {self.side_ratio:g} times "
                "the other (Limits.side_ratio)"
            )


class PixelBudget:
    """Pixels and frames that one prompt may still decode. Shared by the threads that decode."""

    def __init__(self, limits: Limits) -> None:
        self._max_pixels = self._pixels = limits.prompt_pixels
        self._max_frames = self._frames = limits.prompt_frames
        self._lock = Lock()

    def take(self, size: tuple[int, int]) -> None:
        """Raise MediaError if an image of `size` pixels is one too many."""
        with self._lock:
            self._pixels -= size[0] * size[1]
            self._frames -= 1
            if self._pixels < 0:
                raise MediaError(
                    f"the prompt's images have more than the limit of {self._max_pixels:,} pixels "
                    "in all (--media-megapixels, Limits.prompt_pixels)"
                )
            if self._frames < 0:
                raise MediaError(
                    f"the prompt has more than the limit of {self._max_frames} images and frames "
                    "(Limits.prompt_frames); ask for fewer"
                )


class PixelGate:
    """Lets threads decode images of so many pixels at a time, the smallest that waits first."""

    def __init__(self, pixels: int) -> None:
        self._free = self._pixels = pixels
        self._waiting: list[int] = []
        self._changed = Condition()

    def __reduce__(self) -> tuple[type[PixelGate], tuple[int]]:
        return PixelGate, (self._pixels,)

    @contextmanager
    def room(self, size: tuple[int, int]) -> Iterator[None]:
        """Wait for room for an image of this size, and take it."""
        pixels = min(size[0] * size[1], self._pixels)
        with self._changed:
            self._waiting.append(pixels)
            try:
                self._changed.wait_for(
                    lambda: pixels <= self._free and pixels == min(self._waiting)
                )
            finally:
                self._waiting.remove(pixels)
            self._free -= pixels
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


class Deadline:
    """A limit of wall-clock seconds."""

    def __init__(self, seconds: float, task: str, limit: str) -> None:
        self._end = time.monotonic() + seconds
        self._message = f"{task} took longer than the limit of {seconds:g} seconds (Limits.{limit})"

    def left(self) -> float:
        """Seconds left; raises MediaError when there are none."""
        if (left := self._end - time.monotonic()) <= 0:
            raise MediaError(self._message)
        return left
