"""Whatever comes from outside ends in an image or in a MediaError with words of ours."""

import base64
import os
import re
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from llava_interleave import data_url
from llava_interleave.errors import LlavaError, MediaError, MediaRefused, OptionError
from llava_interleave.processing import Limits, Loader
from llava_interleave.processing.fetch import Address, is_public
from llava_interleave.processing.limits import PixelBudget, PixelGate

IMAGE = Image.new("RGB", (6, 4), (200, 30, 30))


def saved(image: Image.Image = IMAGE, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = saved()


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + PNG[33:]
    )


GIF_WITHOUT_FRAMES = b"GIF89a\x04\x00\x04\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff;"
HOSTILE = {
    "empty": b"",
    "text": b"I am a picture, honestly",
    "truncated png": saved(Image.effect_noise((64, 64), 50))[:-200],
    "truncated jpeg": saved(Image.effect_noise((64, 64), 50), "JPEG")[:-200],
    "truncated webp": saved(Image.effect_noise((64, 64), 50).convert("RGB"), "WEBP")[:-200],
    "half a header": PNG[:20],
    "png bomb": png_header(100_000, 100_000),
    "larger than the limit": png_header(9000, 9000),
    "no pixels": png_header(0, 5),
    "a line": png_header(100_000, 1),
    "gif without frames": GIF_WITHOUT_FRAMES,
    "pdf": saved(kind="PDF"),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "html before a png": b"<script>alert(1)</script>" + PNG,
    "webp that is avi": b"RIFF\x00\x00\x00\x00AVI " + PNG,
    "bmp of nothing": b"BM" + bytes(60),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("error")
def test_hostile_files_are_refused_in_our_words(name: str, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(HOSTILE[name])
    for source in (
        HOSTILE[name],
        path,
        "data:image/png;base64," + base64.b64encode(HOSTILE[name]).decode(),
    ):
        with pytest.raises(MediaError) as caught:
            Loader().image(source)
        with pytest.raises(MediaError, match=re.escape(str(caught.value))):
            Loader().fingerprint(source)
        assert "0x" not in str(
            caught.value
        )  # Pillow's message shows the address of an object (CVE-2026-22778)
        assert "cannot identify" not in str(caught.value)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"]), st.data())
def test_damaged_files_never_raise_anything_else(kind: str, data: st.DataObject) -> None:
    blob = bytearray(saved(kind=kind))
    for at in data.draw(st.lists(st.integers(8, len(blob) - 1), max_size=6)):
        blob[at] = data.draw(st.integers(0, 255))
    with suppress(MediaError):
        assert Loader().image(bytes(blob)).mode == "RGB"
    with suppress(MediaError):
        Loader().fingerprint(bytes(blob))


def test_a_whole_file_is_fingerprinted_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.effect_noise((64, 64), 50)
    files = [saved(image), saved(image, "JPEG"), saved(image, "JPEG", progressive=True)]
    found = [Loader().fingerprint(file) for file in files]
    assert len({*found}) == 3
    assert Loader().fingerprint(image) != Loader().fingerprint(image.rotate(90))
    flipped = bytearray(files[0])
    flipped[-40] ^= 1  # of the compressed pixels
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert [Loader().fingerprint(file) for file in files] == found
    for partial in (bytes(flipped), files[1][:-2], saved(image, "BMP")):
        with pytest.raises(MediaError):  # it would have been decoded
            Loader().fingerprint(partial)


def test_data_after_an_image_is_ignored() -> None:
    assert Loader().image(PNG + b"PK\x03\x04 a zip behind it").size == (6, 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1)])
def test_thin_images(size: tuple[int, int]) -> None:
    assert Loader().image(saved(Image.new("RGB", size))).size == size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_source_gives_the_same_image(kind: str, tmp_path: Path) -> None:
    data = saved(kind=kind)
    path = tmp_path / "no ending"
    path.write_bytes(data)
    url = "data:image/whatever;base64," + base64.b64encode(data).decode()
    images = [
        Loader().image(s).tobytes()
        for s in (data, bytearray(data), path, str(path), path.as_uri(), url, Image.open(path))
    ]
    assert len(set(images)) == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,%%%", "damaged"),
        ("data:image/png;base64,A", "damaged"),
        ("data:image/png,hello", "of the form"),
        ("data:image/png;base64", "of the form"),
        (
            "data:image/png;base64," + "A" * 4000,
            "3,000 bytes are more than the limit of 2,000",
        ),
    ],
)
def test_data_urls(url: str, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        Loader(Limits(image_bytes=2000)).image(url)


def test_limits_are_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with pytest.raises(MediaError, match="6 x 4 pixels are more than the limit of 23"):
        Loader(Limits(image_pixels=23)).image(path)
    with pytest.raises(MediaError, match="more than the limit of 20 bytes"):
        Loader(Limits(image_bytes=20)).image(path)
    with pytest.raises(MediaError, match=r"one side may be at most 1\.2 times"):
        Loader(Limits(side_ratio=1.2)).image(IMAGE)
    with pytest.raises(MediaRefused, match="local files"):
        Loader(Limits(allow_local_files=False)).image(path)
    with pytest.raises(MediaRefused, match="URLs may not"):
        Loader(Limits(allow_remote=False)).image("http://example.com/a.png")
    budget = PixelBudget(Limits(prompt_pixels=30))
    Loader().image(path, budget)
    with pytest.raises(MediaError, match="limit of 30 pixels in all"):
        Loader().image(path, budget)
    with pytest.raises(OptionError, match="at most 178,956,970"):
        Limits(image_pixels=10**9)
    with pytest.raises(OptionError, match="video_frames"):
        Limits(video_frames=0)


def test_images_are_decoded_as_far_as_there_is_room() -> None:
    """24 threads held 8 GB of images of 31 million pixels. The smallest that waits comes first."""
    gate, now, order, lock = PixelGate(100), [0, 0], list[int](), threading.Lock()

    def decode(pixels: int) -> None:
        with gate.room((pixels, 1)):
            with lock:
                now[0] += pixels
                now[1] = max(now)
                order.append(pixels)
            time.sleep(0.05)
            with lock:
                now[0] -= pixels

    sizes = [60, 50, 200, 40, 10]  # 200: alone
    threads = [threading.Thread(target=decode, args=(pixels,)) for pixels in sizes]
    for number, thread in enumerate(threads):
        thread.start()
        while number == 0 and not order:
            time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert now == [0, 200]
    assert sorted(order) == sorted(sizes) and order[0] == 60 and order[-1] == 200


@pytest.mark.parametrize("start", ["/", "file:///", "http://a.example/"])
def test_a_long_path_or_url_is_refused_before_it_is_parsed(start: str) -> None:
    """`urlsplit` would keep it, `Path` make a string of each part."""
    kept = urlsplit.cache_info().currsize  # type: ignore[attr-defined]
    for limits in (Limits(), Limits(allow_local_files=False, allow_remote=False)):
        with pytest.raises(MediaError, match="longer than the limit of 16,384"):
            Loader(limits).image(start + "a/" * 10_000)
    assert urlsplit.cache_info().currsize == kept  # type: ignore[attr-defined]


def test_only_regular_files(tmp_path: Path) -> None:
    """Opening a pipe or a device would wait, or read, for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(MediaRefused, match="not a regular file"):
            Loader().image(path)
    wrong: Any
    for wrong in (tmp_path, tmp_path / "absent", "a\0b", "x" * 5000):
        with pytest.raises(MediaError):
            Loader().image(wrong)


def test_media_root_holds(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret.png"
    (root / "sub").mkdir(parents=True)
    secret.write_bytes(PNG)
    (root / "sub" / "ok.png").write_bytes(PNG)
    (root / "inside.png").symlink_to(root / "sub" / "ok.png")
    (root / "outside.png").symlink_to(secret)
    (root / "folder").symlink_to(tmp_path)
    loader = Loader(Limits(media_root=root))
    for path in (
        "sub/ok.png",
        "inside.png",
        root / "sub" / "ok.png",
        (root / "inside.png").as_uri(),
        "sub/../sub/ok.png",
    ):
        assert loader.image(path).size == (6, 4)
    for path in (
        "outside.png",
        "../secret.png",
        secret,
        secret.as_uri(),
        "folder/secret.png",
        "/etc/passwd",
        "../absent.png",
    ):
        with pytest.raises(MediaRefused, match="out of the folder"):
            loader.image(path)
    with pytest.raises(MediaRefused, match="out of the folder"):
        loader.video("..")
    with pytest.raises(MediaRefused, match="another machine"):
        loader.image("file://server/share/a.png")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/a.png", "gopher://example.com/", "http://user:word@example.com/", "http://example.com\\@10.0.0.1/",
        "http://exa mple.com/", "http://example.com/\r\nHost: x", "http://127.1/", "http://0x7f.0.0.1/", "http://2130706433/",
        "http://0177.0.0.1/", "http://127.0.0.1.:99999/", "http://[::1%25eth0]/", "http://[::1/", "http://ex\u00e4mple.com/",
        "http:///a.png", "http://\u2488.example/", "http://example.com:port/",
    ],
)  # fmt: skip
def test_urls_written_in_a_tricky_way_are_refused(url: str) -> None:
    with pytest.raises(MediaRefused):
        Loader().image(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "198.18.0.1", "192.0.2.1", "192.88.99.1", "::1", "::", "fe80::1", "fc00::1", "fec0::1",
        "ff02::1", "::ffff:8.8.8.8", "::ffff:127.0.0.1", "::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1",
        "2002:7f00:1::", "2002:808:808::",
        "2001:0:1::1", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_addresses_that_are_public() -> None:
    assert all(map(is_public, ("8.8.8.8", "1.1.1.1", "2606:4700:4700::1111")))


def test_redirects_keep_scheme_and_port() -> None:
    start = Address.parse("https://example.com/a")
    assert start.redirected("/b?c=d").target == "/b?c=d"
    assert Address.parse("http://example.com").redirected("https://example.com/x").port == 443
    for location in (
        "http://example.com/",
        "https://example.com:8443/",
        "//example.com:22/",
        "file:///etc/passwd",
        "\\\\x",
    ):
        with pytest.raises(MediaRefused):
            start.redirected(location)


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def server(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """A server on loopback; yields its URL and the paths asked of it."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            try:
                answer(self)
            except OSError:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}", paths
    finally:
        http.shutdown()
        http.server_close()


def send(
    handler: BaseHTTPRequestHandler, status: int = 200, body: bytes = PNG, **headers: str
) -> None:
    handler.send_response(status)
    for name, value in (
        {"Content-Length": str(len(body))} | {k.replace("_", "-"): v for k, v in headers.items()}
    ).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def local(**limits: Any) -> Loader:
    return Loader(Limits(**({"allow_private": True, "download_seconds": 5} | limits)))


def test_an_image_is_fetched_and_its_url_named_without_its_query() -> None:
    with server(send) as (url, paths):
        assert local().image(f"{url}/ä b.png?secret=1".replace(" ", "%20")).size == (6, 4)
        assert paths == ["/%C3%A4%20b.png?secret=1"]
    with (
        server(lambda h: send(h, 404)) as (url, _),
        pytest.raises(MediaError, match="status 404") as caught,
    ):
        local().image(f"{url}/a.png?secret=1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"])
def test_loopback_is_refused_before_a_byte_is_sent(host: str) -> None:
    with server(send) as (url, paths):
        with pytest.raises(MediaRefused, match="not public"):
            Loader().image(url.replace("127.0.0.1", host))
        assert paths == []


def test_one_private_answer_among_public_ones_is_enough_to_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that answers with a public address for the check and a private one for the connection
    (rebinding) finds no gap.
    """
    answers = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in ("8.8.8.8", "10.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    with pytest.raises(MediaRefused, match="not public"):
        Loader().image("http://example.com/a.png")


def test_the_checked_address_is_dialled_and_the_name_resolved_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolved: list[str] = []
    hosts: list[str | None] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        hosts.append(handler.headers["Host"])
        send(handler)

    with server(answer) as (url, _):
        port = int(url.rsplit(":", 1)[1])

        def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
            resolved.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        original = socket.create_connection
        dialled: list[str] = []

        def dial(address: tuple[str, int], *args: Any, **more: Any) -> socket.socket:
            dialled.append(address[0])
            with monkeypatch.context() as patch:
                patch.undo()
            return original(address, *args, **more)

        monkeypatch.setattr(socket, "create_connection", dial)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: resolve(*a, **k))
        assert local().image(f"http://pictures.example:{port}/a.png").size == (6, 4)
    assert dialled == ["127.0.0.1"]
    assert hosts == [f"pictures.example:{port}"]
    assert resolved[0] == "pictures.example"
    assert "pictures.example" not in resolved[1:]


def test_a_redirect_is_checked_like_the_first_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that looked only at the first URL was walked around with a redirect
    (CVE-2026-63764).
    """
    monkeypatch.setattr(
        "llava_interleave.processing.fetch.is_public", lambda address: address == "127.0.0.1"
    )
    with server(
        lambda h: send(h, 302, b"", Location=f"http://127.0.0.2:{h.headers['Host'].split(':')[1]}/")
    ) as (url, paths):
        with pytest.raises(MediaRefused, match="not public"):
            Loader().image(url)
        assert len(paths) == 1
    with (
        server(lambda h: send(h, 302, b"", Location="http://127.0.0.1:1/")) as (url, _),
        pytest.raises(MediaRefused, match="port"),
    ):
        Loader().image(url)


def test_redirects_end() -> None:
    with server(lambda h: send(h, 302, b"", Location=h.path + "x")) as (url, paths):
        with pytest.raises(MediaError, match="more than 5 times"):
            local().image(url + "/")
        assert len(paths) == 6
    with server(lambda h: send(h) if h.path == "/b" else send(h, 301, b"", Location="/b")) as (
        url,
        _,
    ):
        assert local().image(url).size == (6, 4)


def test_downloads_are_bounded_in_bytes() -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(65536))

    with (
        server(endless) as (url, _),
        pytest.raises(MediaError, match="more than the limit of 100,000 bytes"),
    ):
        local(image_bytes=100_000).image(url)
    with (
        server(lambda h: send(h, Content_Length="99999999999")) as (url, _),
        pytest.raises(MediaError, match="99,999,999,999 bytes"),
    ):
        local().image(url)
    with (
        server(lambda h: send(h, Content_Encoding="gzip")) as (url, _),
        pytest.raises(MediaError, match="compressed"),
    ):
        local().image(url)
    with (
        server(lambda h: send(h, Content_Length="5000")) as (url, _),
        pytest.raises(MediaError, match=r"broke off|longer than"),
    ):
        local(download_seconds=1).image(url)


@pytest.mark.parametrize("headers", [True, False])
def test_downloads_are_bounded_in_time(headers: bool) -> None:
    """A server that sends one byte now and then keeps every single read within its time."""

    def drip(handler: BaseHTTPRequestHandler) -> None:
        if headers:
            handler.send_response(200)
            handler.end_headers()
        while True:
            handler.wfile.write(b"X")
            handler.wfile.flush()
            time.sleep(0.05)

    with (
        server(drip) as (url, _),
        pytest.raises(MediaError, match=r"longer than the limit of 0\.5 seconds|broke off"),
    ):
        local(download_seconds=0.5).image(url)


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(MediaError, match="cannot be reached"):
        local().image(f"http://127.0.0.1:{port}/")


def test_sources_of_no_known_kind() -> None:
    for source in (3, None, object(), {"url": "x"}):
        with pytest.raises(LlavaError, match="not a source of media"):
            Loader().image(source)


@pytest.mark.parametrize("text", ["%41", " A", "%2B", "A\n"])
def test_base64_is_decoded_in_bounded_memory(text: str) -> None:
    """`unquote` took a gigabyte for 60 MB of %41."""
    url = "data:image/png;base64," + text * (4_000_000 // len(text))
    tracemalloc.start()
    with suppress(ValueError):
        data_url.decode(url)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * len(url)


@pytest.mark.parametrize("chunk", [1, 6, 1 << 16])
def test_base64_may_be_escaped_in_a_url(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """In chunks, so that other threads run while megabytes are decoded."""
    monkeypatch.setattr(data_url, "CHUNK", chunk)
    data = bytes(range(256))
    plain = base64.b64encode(data).decode()
    for text in (
        plain,
        plain.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
        plain.replace("+", "-").replace("/", "_").rstrip("="),
        " \n" + plain[:50] + "%0D%0A\t" + plain[50:],
    ):
        assert data_url.decode("data:;base64," + text) == data
    for bad in ("%41%42", "QQ==QQ==", "QQ=QQ", "Q", "QUJDR", "QUI=\n=QQ", "QU*D", "QU\0D", "é"):
        with pytest.raises(ValueError, match=r"(?i)base64|padding|character|ascii"):
            data_url.decode("data:;base64," + bad)
