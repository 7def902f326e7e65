"""Files made to hold up a server end in bounded time and memory, others are answered meanwhile."""

import base64
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llava_interleave.server.run import Server
from llava_interleave.testing import tiny_checkpoint
from tests.helpers.fairness import (
    ATTACKER,
    GUEST,
    answered_in_time,
    ask,
    client,
    in_background,
)
from tests.helpers.hostile_files import (
    filled_scan,
    gif,
    gif_extension,
    key_frames,
    many_samples,
    png_chunks,
    scans,
    with_segments,
)
from tests.helpers.requests import WHAT, bomb, user
from tests.helpers.server import listening, until

pytestmark = pytest.mark.slow

MEDIA_TIMEOUT = 3.0
MOST_SECONDS = 40.0
MOST_MEMORY = 1_500_000  # kilobytes more than before


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("attack")
    (folder / "keys").write_text(f"{ATTACKER}\n{GUEST}\n")
    model = tiny_checkpoint(folder / "tiny")
    limits = {"api_keys": folder / "keys", "media_timeout": MEDIA_TIMEOUT}
    with listening(model, shutdown_timeout=0.1, **limits) as server:
        yield server


def fragments(count: int) -> bytes:
    """An MP4 that promises a million samples in each of so many fragments."""
    trun = struct.pack(">I4sII", 16, b"trun", 0, 1_000_000)
    tfhd = struct.pack(">I4sII", 16, b"tfhd", 0x020000, 1)
    traf = struct.pack(">I4s", 8 + len(tfhd + trun), b"traf") + tfhd + trun
    mfhd = struct.pack(">I4sII", 16, b"mfhd", 0, 1)
    moof = struct.pack(">I4s", 8 + len(mfhd + traf), b"moof") + mfhd + traf
    return key_frames(1, "mp4") + moof * count


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image", "base64": base64.b64encode(data).decode()}


def video_part(data: bytes) -> dict[str, Any]:
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    return {"type": "video_url", "video_url": {"url": url}}


FILES: dict[str, Callable[[], dict[str, Any]]] = {
    "100,000 key frames": lambda: video_part(key_frames(100_000)),
    "ten minutes of MJPEG": lambda: video_part(key_frames(15_000, rate=25)),
    "a kilobyte of a billion samples": lambda: video_part(many_samples(1_000_000_000)),
    "a GIF of many large frames": lambda: video_part(gif(400, 2000)),
    "a JPEG of many scans": lambda: image_part(scans(300, 2000)),
    "a PNG of many pixels": lambda: image_part(bomb()),
    "a JPEG of filling": lambda: image_part(with_segments(b"\xff")),
    "a JPEG of empty segments": lambda: image_part(with_segments(b"\xff\xe5\0\2")),
    "a JPEG of much EXIF": lambda: image_part(
        with_segments(b"\xff\xe1" + struct.pack(">H", 60_008) + b"Exif\0\0" + b"x" * 60_000)
    ),
    "a JPEG whose data is filling": lambda: image_part(filled_scan()),
    "a PNG of empty chunks": lambda: image_part(png_chunks()),
    "a GIF of one comment": lambda: image_part(gif_extension(b"\xff" + b"x" * 255)),
    "a GIF of tiny blocks": lambda: image_part(gif_extension(b"\1x", b"\1")),
    "a video of promised fragments": lambda: video_part(fragments(3000)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_delays_no_other_request(server: Server, name: str) -> None:
    part = FILES[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with client(server, ATTACKER) as attacker, client(server, GUEST) as guest:
        start = time.monotonic()
        with in_background(attacker, 3, messages=user(part, "What?")) as statuses:
            until(lambda: server.service.num_active or statuses)  # type: ignore[attr-defined]
            answered_in_time(guest)
            answered_in_time(guest, messages=WHAT)
        assert time.monotonic() - start < MOST_SECONDS
        assert set(statuses) <= {200, 400} and len(statuses) == 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


def test_the_corpus_is_refused_in_words(server: Server) -> None:
    with client(server, ATTACKER) as attacker:
        for name, words in (
            ("a kilobyte of a billion samples", "packets, more than the limit"),
            ("a JPEG of many scans", "scans of 2000 x 2000"),
            ("a GIF of many large frames", "took longer than the limit of 3 seconds"),
        ):
            refused: httpx.Response = ask(attacker, messages=user(FILES[name](), "What?"))
            assert refused.status_code == 400 and words in refused.text, name


def test_a_lawful_video_of_many_packets_is_read(tmp_path: Path) -> None:
    from llava_interleave.processing import FrameSampling, Loader

    (tmp_path / "long.mp4").write_bytes(key_frames(15_000, "mp4", rate=25))
    clip = Loader().video(tmp_path / "long.mp4", FrameSampling(frames=2))
    assert clip.times == pytest.approx([0.0, 14_999 / 25])
