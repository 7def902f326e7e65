"""WebP decoded without the interpreter's lock has Pillow's pixels, and stops no other thread."""

import io
import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image, WebPImagePlugin

from llava_interleave.errors import MediaError
from llava_interleave.processing import Loader
from llava_interleave.processing.webp import LIBRARY, release_interpreter
from tests.helpers import hostile_files

CHANCE = np.random.default_rng(0)


def webp(mode: str, frames: int = 1, **settings: Any) -> bytes:
    shape = (37, 53, len(mode))
    images = [
        Image.fromarray(CHANCE.integers(0, 255, shape, dtype=np.uint8)) for _ in range(frames)
    ]
    out = io.BytesIO()
    images[0].save(out, "WEBP", save_all=frames > 1, append_images=images[1:], **settings)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("settings", [{"lossless": True}, {"quality": 60}], ids=str)
def test_pixels_are_pillows(mode: str, frames: int, settings: dict[str, Any]) -> None:
    data = webp(mode, frames, duration=40, **settings)
    with Image.open(io.BytesIO(data)) as ours, Image.open(io.BytesIO(data)) as pillows:
        assert isinstance(ours, WebPImagePlugin.WebPImageFile)
        release_interpreter(ours, data)
        for frame in (*range(frames), 0, frames - 1):
            ours.seek(frame)
            pillows.seek(frame)
            assert ours.tobytes() == pillows.tobytes()
            assert (ours.mode, ours.info) == (pillows.mode, pillows.info)


def test_a_damaged_file_is_refused_as_before() -> None:
    data = webp("RGB", lossless=True)
    data = data[:40] + bytes(len(data) - 40)
    with Image.open(io.BytesIO(data)) as ours:
        assert isinstance(ours, WebPImagePlugin.WebPImageFile)
        release_interpreter(ours, data)
        with pytest.raises(EOFError):
            ours.load()
    with pytest.raises(MediaError, match="damaged"):
        Loader().image(data)


@pytest.mark.skipif(LIBRARY is None, reason="libwebp is linked into Pillow's module")
def test_other_threads_run_meanwhile() -> None:
    """40 bytes of 31 million pixels held the interpreter's lock for nearly all of their time."""
    data, turns, over = hostile_files.webp(5600), [time.monotonic()], threading.Event()

    def count() -> None:
        while not over.wait(0.001):
            turns.append(time.monotonic())

    def longest_wait() -> float:
        """Of the other thread, as a share of the time that the image takes."""
        del turns[:-1]
        start = time.monotonic()
        Loader().image(data)
        seconds = time.monotonic() - start
        return max(b - a for a, b in itertools.pairwise([*turns, time.monotonic()])) / seconds

    other = threading.Thread(target=count)
    other.start()
    try:
        assert min(longest_wait() for _ in range(3)) < 0.3
    finally:
        over.set()
        other.join()
