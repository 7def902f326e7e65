"""Files and requests made to hold up a server end in bounded time and memory, others are answered
meanwhile.
"""

import base64
import contextlib
import json
import resource
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llava_interleave.server.run import Server
from llava_interleave.testing import tiny_checkpoint
from tests.helpers.fairness import (
    ATTACKER,
    CHAT,
    GUEST,
    HELLO,
    answered_in_time,
    ask,
    client,
    in_background,
)
from tests.helpers.hostile_files import (
    bmp,
    filled_scan,
    gif,
    gif_extension,
    key_frames,
    many_samples,
    png_chunks,
    scans,
    tiff,
    webp,
    with_segments,
)
from tests.helpers.requests import RED, WHAT, bomb, data_url, nested, png, user
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
    "a JPEG whose data is markers": lambda: image_part(filled_scan(fill=b"\xff\xe5")),
    "a PNG of empty chunks": lambda: image_part(png_chunks()),
    "a GIF of one comment": lambda: image_part(gif_extension(b"\xff" + b"x" * 255)),
    "a GIF of tiny blocks": lambda: image_part(gif_extension(b"\1x", b"\1")),
    "a TIFF of a million strips": lambda: image_part(tiff((273, 4, 1_000_000))),
    "a BMP of lines to fill": lambda: image_part(bmp(5500, 5500, b"\1\7\0\0" * 5500)),
    "a path of megabytes": lambda: {"type": "image", "path": "/a" * 20_000_000},
    "a WebP of many pixels": lambda: image_part(webp(3000)),
    "a video of promised fragments": lambda: video_part(fragments(3000)),
    "a video of empty boxes": lambda: video_part(
        key_frames(1, "mp4") + struct.pack(">I4s", 8, b"free") * 2_000_000
    ),
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


def test_a_form_in_the_place_of_json_is_refused(server: Server) -> None:
    """A form is read piece by piece, which a route of JSON took for one message."""
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with client(server, ATTACKER) as attacker:
        refused = attacker.post(CHAT, content=b"x" * 300_000, headers=headers)
        assert refused.status_code == 415 and "send application/json" in refused.text


def test_the_corpus_is_refused_in_words(server: Server) -> None:
    with client(server, ATTACKER) as attacker:
        for name, words in (
            ("a kilobyte of a billion samples", "packets, more than the limit"),
            ("a JPEG of many scans", "scans of 2000 x 2000"),
            ("a video of empty boxes", "more than the limit of 200,000 boxes"),
            ("a GIF of many large frames", "took longer than the limit of 3 seconds"),
        ):
            refused: httpx.Response = ask(attacker, messages=user(FILES[name](), "What?"))
            assert refused.status_code == 400 and words in refused.text, name


def test_a_lawful_video_of_many_packets_is_read(tmp_path: Path) -> None:
    from llava_interleave.processing import FrameSampling, Loader

    (tmp_path / "long.mp4").write_bytes(key_frames(15_000, "mp4", rate=25))
    clip = Loader().video(tmp_path / "long.mp4", FrameSampling(frames=2))
    assert clip.times == pytest.approx([0.0, 14_999 / 25])


ENDLESS = {"max_tokens": 400, "ignore_eos": True, "stop_on_repetition": False}
LARGE = data_url(png("red", (1500, 1500)))


def batch(attacker: httpx.Client, rows: Iterable[str]) -> list[int]:
    """A batch of these rows, cancelled after a while."""
    files = {"file": ("rows.jsonl", "\n".join(rows))}
    stored = attacker.post("/v1/files", files=files, data={"purpose": "batch"})
    if stored.status_code != 200:
        return [stored.status_code]
    fields = {"endpoint": CHAT, "completion_window": "24h"}
    made = attacker.post("/v1/batches", json={"input_file_id": stored.json()["id"], **fields})
    if made.status_code != 200:
        return [made.status_code]
    time.sleep(0.3)
    address = f"/v1/batches/{made.json()['id']}"
    attacker.post(f"{address}/cancel")
    until(lambda: attacker.get(address).json()["status"] in ("cancelled", "completed", "failed"))
    attacker.delete(f"/v1/files/{stored.json()['id']}")
    return [200]


def row(number: int, **body: Any) -> str:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2} | body
    line = {"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}
    return json.dumps(line)


def leaving(attacker: httpx.Client, path: str, **body: Any) -> list[int]:
    """A request whose client leaves while it is answered."""
    with contextlib.suppress(httpx.ReadTimeout):
        return [attacker.post(path, json={"model": "tiny", **body}, timeout=0.5).status_code]
    return []


def live(attacker: httpx.Client) -> list[int]:
    """Sessions that nobody ends."""
    made = [attacker.post("/v1/live", json={"model": "tiny"}) for _ in range(6)]
    for one in made[:2]:
        for _ in range(2):
            files = {"file": ("a.png", png("blue", (1500, 1500)))}
            attacker.post(f"/v1/live/{one.json()['id']}/frames", files=files)
    return [one.status_code for one in made]


def prefill(attacker: httpx.Client) -> list[int]:
    """Each ends the one before."""
    messages = [[{"role": "user", "content": f"{i} " + "word " * 300}] for i in range(8)]
    bodies = [{"model": "tiny", "messages": one} for one in messages]
    return [attacker.post("/v1/messages/prefill", json=body).status_code for body in bodies]


def form(attacker: httpx.Client, parts: bytes) -> list[int]:
    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    return [attacker.post("/v1/files", content=parts, headers=headers).status_code]


PART = b'--B\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n%s\r\n'
COLUMNS = [{"name": f"c{i}", "question": "What?"} for i in range(100)]
REQUESTS: dict[str, Callable[[httpx.Client], list[int]]] = {
    "a batch of damaged images": lambda attacker: batch(
        attacker, (row(i, messages=user(image_part(b"\x89PNG"), "?")) for i in range(40))
    ),
    "a batch of large images": lambda attacker: batch(
        attacker, (row(i, messages=user(image_part(png("red", (800, 800))))) for i in range(40))
    ),
    "a batch of endless answers": lambda attacker: batch(
        attacker, (row(i, **ENDLESS) for i in range(100))
    ),
    "a batch of deep rows": lambda attacker: batch(attacker, [nested(50), "", nested(10_000)] * 20),
    "a batch of one name": lambda attacker: batch(attacker, (row(1) for _ in range(500))),
    "a table of 3,200 cells": lambda attacker: leaving(
        attacker, "/v1/images/table", images=[RED] * 32, columns=COLUMNS
    ),
    "find over large images": lambda attacker: leaving(
        attacker, "/v1/images/find", images=[LARGE] * 32, question="Is it red?"
    ),
    "live sessions": live,
    "prefills": prefill,
    "a form of many parts": lambda attacker: form(attacker, PART % (b"a", b"") * 50_000),
    "a form of many headers": lambda attacker: form(attacker, PART % (b"a", b"A: b\r\n" * 100_000)),
    "a form with a name of megabytes": lambda attacker: form(
        attacker, PART % (b"a" * 4_000_000, b"")
    ),
    "many prompts": lambda attacker: [
        attacker.post("/v1/completions", json={"model": "tiny", "prompt": ["a"] * 4000}).status_code
    ],
    "an endless response": lambda attacker: leaving(
        attacker, "/v1/responses", input="a", max_output_tokens=4000
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_delays_no_other_one(server: Server, name: str) -> None:
    with client(server, ATTACKER) as attacker, client(server, GUEST) as guest:
        statuses: list[int] = []
        attack = threading.Thread(target=lambda: statuses.extend(REQUESTS[name](attacker)))
        attack.start()
        answered_in_time(guest)
        answered_in_time(guest, messages=WHAT)
        attack.join(MOST_SECONDS)
        assert not attack.is_alive()
        assert {*statuses} <= {200, 400, 413, 429, 503}
        until(lambda: not server.service.num_active)  # type: ignore[attr-defined]
