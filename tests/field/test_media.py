"""Files as phones, browsers and video tools write them: what the reference readers show is read."""

import base64
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from llava_interleave.chat.attachments import content, part
from llava_interleave.errors import LlavaError, MediaError
from llava_interleave.processing import FrameSampling, Limits, Loader
from llava_interleave.processing.formats import is_video
from llava_interleave.processing.loader import _file_url_path
from llava_interleave.processing.video import _displayed

FFMPEG = shutil.which("ffmpeg")
RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8))
ALL = FrameSampling(frames=256)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(data: bytes) -> np.ndarray:
    return np.asarray(Loader().image(data))


def data_url(data: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def frames(kind: str, **options: Any) -> bytes:
    images = [Image.new("RGB", (32, 24), color) for color in ("red", "lime", "blue")]
    return saved(
        images[0],
        kind,
        save_all=True,
        append_images=images[1:],
        duration=[100, 200, 300],
        **options,
    )


# Images


def test_avif_is_an_image_with_its_rotation_and_transparency(tmp_path: Path) -> None:
    """FFmpeg reads an AVIF as a video of one frame, without orientation and alpha."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(NOISE, "AVIF", quality=100, subsampling="4:4:4", exif=exif)
    assert part(data)["type"] == part(data_url(data))["type"] == "image"
    assert Loader().image(data).size == Loader().image_size(data) == (40, 60)
    turned = np.asarray(NOISE.transpose(Image.Transpose.ROTATE_270), int)
    assert np.abs(read(data) - turned).max() <= 4
    (tmp_path / "a.mp4").write_bytes(data)
    assert part(tmp_path / "a.mp4")["type"] == "image"
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (read(saved(clear, "AVIF")) == 255).all()
    with pytest.raises(MediaError, match="this is an image, not a video"):
        Loader().video(data)


def test_heic_is_read_by_pillow_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    file = BytesIO()
    try:
        heif.from_pillow(NOISE).save(file, quality=-1, chroma=444)
    except Exception:  # noqa: BLE001  a build without an encoder
        pytest.skip("this pillow-heif writes no HEIC")
    data = file.getvalue()
    assert part(data)["type"] == "image"
    assert np.abs(read(data).astype(int) - np.asarray(NOISE)).mean() < 3
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif.as_plugin", None)
    with pytest.raises(
        MediaError, match=r"need pillow-heif: pip install 'llava-interleave\[heif\]'"
    ):
        read(data)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg"])
def test_tiff(compression: str) -> None:
    data = saved(NOISE, "TIFF", compression=compression)
    with Image.open(BytesIO(data)) as expected:
        assert np.array_equal(read(data), np.asarray(expected.convert("RGB")))


def test_tiff_orientation_is_applied_once() -> None:
    data = saved(NOISE, "TIFF", tiffinfo={274: 6})
    assert Loader().image(data).size == Loader().image_size(data) == (40, 60)
    assert np.array_equal(read(data), np.asarray(NOISE.transpose(Image.Transpose.ROTATE_270)))


def test_a_camera_raw_file_is_not_its_preview() -> None:
    for tags in ({254: 1}, {50706: b"\1\4\0\0"}):
        with pytest.raises(MediaError, match="raw file"):
            read(saved(NOISE, "TIFF", tiffinfo=tags))
    with pytest.raises(MediaError, match="not a video in a known format"):
        Loader().video(b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(600))


def wide(values: list[float], kind: type, mode: str) -> list[int]:
    image = Image.fromarray(np.array([values], kind))
    assert image.mode == mode
    return np.asarray(Loader().image(image))[0, :, 0].tolist()


def test_gray_of_many_bits_has_one_rule() -> None:
    """Mode I of 8-bit values became black, 16-bit gray white, and mode F was refused."""
    assert wide([0, 100, 255], np.int32, "I") == [0, 100, 255]
    assert wide([0, 128, 4095], np.uint16, "I;16") == [0, 8, 255]
    assert wide([0, 32768, 65535], np.uint16, "I;16") == [0, 128, 255]
    assert wide([0, 257, 65535], np.int32, "I") == [0, 1, 255]
    assert wide([-1024, 0, 3071], np.int32, "I") == [0, 64, 255]
    assert wide([0, 2**30, 2**31 - 1], np.int32, "I") == [0, 128, 255]
    assert wide([0.0, 0.5, 1.0], np.float32, "F") == [0, 128, 255]
    assert wide([0.0, 100.0, 255.0], np.float32, "F") == [0, 100, 255]
    assert wide([np.nan, 0.5, np.inf, 1], np.float32, "F") == [0, 128, 0, 255]
    assert wide([7, 7, 7], np.int32, "I") == [7, 7, 7]
    assert wide([-5, -5, -3], np.int32, "I") == [0, 0, 2]
    data = saved(Image.fromarray(np.array([[0, 100, 200]], np.int32)), "TIFF")
    assert read(data)[0, :, 0].tolist() == [0, 100, 200]


def test_damaged_exif_is_not_a_damaged_image() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0" * 3
    data = saved(NOISE, "JPEG", quality=95, exif=exif)
    with Image.open(BytesIO(data)) as expected:
        assert np.array_equal(read(data), np.asarray(expected))


def test_a_photo_of_108_megapixels_names_its_flag() -> None:
    photo = Image.new("L", (12_000, 9_000))
    with pytest.raises(MediaError, match=r"108,000,000|12000 x 9000 .*--image-megapixels"):
        Loader().image(photo)
    assert Loader(Limits(image_pixels=110_000_000)).image(photo).size == photo.size


# Animations


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animations_are_videos_wherever_a_gif_is_one(kind: str, tmp_path: Path) -> None:
    data = frames(kind)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (data, path, str(path), data_url(data)):
        assert part(source)["type"] == "video"
    clip = Loader().video(data)
    assert clip.times == pytest.approx([0, 0.1, 0.3])
    assert clip.duration == pytest.approx(0.6)
    shown = [tuple(np.asarray(f).reshape(-1, 3).mean(0) > 128) for f in clip.frames]
    assert shown == [(True, False, False), (False, True, False), (False, False, True)]
    assert np.abs(read(data)[0, 0].astype(int) - (255, 0, 0)).max() < 8  # as an image: its first
    if kind not in ("GIF", "WEBP"):
        still = saved(NOISE, kind)
        assert part(still)["type"] == "image"


def test_the_default_image_of_an_apng_is_not_a_frame() -> None:
    images = [Image.new("RGB", (8, 8), color) for color in ("white", "red", "blue")]
    data = saved(images[0], "PNG", save_all=True, append_images=images[1:], default_image=True)
    colors = [np.asarray(f)[0, 0].tolist() for f in Loader().video(data).frames]
    assert colors == [[255, 0, 0], [0, 0, 255]]
    assert read(data)[0, 0].tolist() == [255, 255, 255]


# Videos


def ramp(path: Path, seconds: int = 4, codec: str = "libx264", **options: str) -> Path:
    """Frames of gray 16 + 5 n at 10 a second, a keyframe each 8, with B-frames."""
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 8
        stream.options = {"bf": "2"}
        for n in range(seconds * 10):
            frame = av.VideoFrame.from_ndarray(
                np.full((72, 64), 16 + 5 * n, np.uint8), format="yuv420p"
            )
            for plane in frame.planes[1:]:
                plane.update(bytes([128]) * plane.buffer_size)
            frame.pts = n
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def numbers(images: list[Image.Image]) -> list[int]:
    """The numbers of a ramp's frames."""
    return [round(float(np.asarray(i).mean()) * 219 / 255 / 5) for i in images]


def boxed(data: bytes, path: list[bytes], payload: bytes) -> bytes:
    """The MP4 with another payload of the box at `path`."""
    out, at = b"", 0
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + size]
        if kind == path[0]:
            body = boxed(body, path[1:], payload) if path[1:] else payload
        out += struct.pack(">I", len(body) + 8) + kind + body
        at += size
    return out


def edited(data: bytes, edits: list[tuple[float, float]]) -> bytes:
    """A ramp with an edit list of lengths and beginnings in seconds; -1 is a pause."""
    at = data.index(b"mdhd")
    scale = int.from_bytes(data[at + 16 : at + 20], "big")
    at = data.index(b"elst")
    first = int.from_bytes(data[at + 16 : at + 20], "big")
    entries = [
        struct.pack(">IiI", round(s * 1000), -1 if b < 0 else round(b * scale) + first, 1 << 16)
        for s, b in edits
    ]
    payload = struct.pack(">II", 0, len(entries)) + b"".join(entries)
    return boxed(data, [b"moov", b"trak", b"edts", b"elst"], payload)


@pytest.mark.parametrize(
    ("edits", "shown"),
    [
        ([(9, 1.3)], list(range(13, 40))),
        ([(1.5, 1.3)], list(range(13, 28))),
        ([(1, 2.0), (0.5, 0.5)], [*range(20, 30), *range(5, 10)]),
        ([(0.5, 1.0), (0.5, 1.0)], [*range(10, 15), *range(10, 15)]),
        ([(0.7, -1), (2, 1.3)], list(range(13, 33))),
    ],
)
def test_videos_cut_without_encoding(
    tmp_path: Path, edits: list[tuple[float, float]], shown: list[int]
) -> None:
    """Packets before the cut are needed to decode what is shown, and are not shown."""
    data = edited(ramp(tmp_path / "a.mp4").read_bytes(), edits)
    clip = Loader().video(data, ALL)
    assert numbers(clip.frames) == shown
    if len(edits) == 1 or edits[0][1] == -1:
        assert clip.times == pytest.approx([i / 10 for i in range(len(shown))])
    for index in (0, 4, len(shown) - 1):
        one = Loader().video(data, FrameSampling(times=(clip.times[index],)))
        assert numbers(one.frames) == [shown[index]]
    (tmp_path / "b.mp4").write_bytes(data)
    assert_as_ffmpeg(tmp_path / "b.mp4")


def assert_as_ffmpeg(path: Path) -> None:
    """Frames and times are those of the ffmpeg command, where there is one."""
    if not FFMPEG:
        return
    command = [FFMPEG, "-v", "quiet", "-i", str(path), "-vsync", "passthrough", "-copyts"]
    raw = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True
    )
    clip = Loader().video(path, ALL)
    width, height = clip.frames[0].size
    shown = np.frombuffer(raw.stdout, np.uint8).reshape(-1, height, width, 3)
    assert len(shown) == len(clip.frames)
    for frame, expected in zip(clip.frames, shown, strict=True):
        assert np.abs(np.asarray(frame, int) - expected).mean() < 1
    lines = subprocess.run(
        [*command, "-f", "framehash", "-"], capture_output=True, text=True
    ).stdout
    base = next(line.split(": ")[1] for line in lines.splitlines() if line.startswith("#tb 0"))
    unit = int(base.split("/")[0]) / int(base.split("/")[1])
    stamps = [int(line.split(",")[2]) for line in lines.splitlines() if line[0] != "#"]
    assert clip.times == pytest.approx([(s - stamps[0]) * unit for s in stamps], abs=unit)


@pytest.mark.parametrize("percent", [60, 75, 90])
def test_fragmented_files_that_end_early(tmp_path: Path, percent: int) -> None:
    """What was written until a recording broke off can be seen; FFmpeg shows it, or refuses."""
    path = ramp(tmp_path / "a.mp4", movflags="frag_keyframe+empty_moov")
    whole = numbers(Loader().video(path, ALL).frames)
    data = path.read_bytes()
    clip = Loader().video(data[: len(data) * percent // 100], ALL)
    assert 0 < len(clip.frames) < 40
    assert numbers(clip.frames) == whole[: len(clip.frames)]


def test_first_frames_whose_stamps_would_be_negative(tmp_path: Path) -> None:
    source, path = ramp(tmp_path / "a.mkv"), tmp_path / "b.mkv"
    with av.open(str(source)) as old, av.open(str(path), "w") as out:
        out.flags |= 0
        stream = out.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None and packet.pts is not None and packet.pts >= 800:
                packet.stream = stream
                packet.pts -= 1250
                packet.dts -= 1250
                out.mux(packet)
    clip = Loader().video(path, ALL)
    assert numbers(clip.frames)[-1] == 39
    assert np.diff(numbers(clip.frames)).tolist() == [1] * (len(clip.frames) - 1)
    assert np.diff(clip.times) == pytest.approx([0.1] * (len(clip.frames) - 1))


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((-1, 0, 0, 1), [Image.Transpose.FLIP_LEFT_RIGHT]),
        ((1, 0, 0, -1), [Image.Transpose.FLIP_TOP_BOTTOM]),
        ((0, 1, 1, 0), [Image.Transpose.TRANSPOSE]),
        ((0, -1, -1, 0), [Image.Transpose.TRANSVERSE]),
        ((0, 1, -1, 0), [Image.Transpose.ROTATE_270]),
        ((0, -1, 1, 0), [Image.Transpose.ROTATE_90]),
        ((-1, 0, 0, -1), [Image.Transpose.ROTATE_180]),
        ((1, 0, 0, 1), []),
    ],
)
def test_mirrored_display_matrices(
    matrix: tuple[int, int, int, int], expected: list[Image.Transpose]
) -> None:
    """Front cameras mirror; `frame.rotation` alone shows their videos upside down or reversed."""
    a, b, c, d = (x << 16 for x in matrix)
    image = NOISE
    for step in expected:
        image = image.transpose(step)
    shown = _displayed(NOISE, [a, b, 0, c, d, 0, 0, 0, 1 << 30])
    assert np.array_equal(np.asarray(shown), np.asarray(image))


@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.mov", "qtrle", "argb"),
        ("a.mkv", "ffv1", "yuva420p"),
    ],
)
def test_transparency_of_videos_is_white(tmp_path: Path, name: str, codec: str, form: str) -> None:
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[:, 32:] = (255, 0, 0, 255)
    with av.open(str(tmp_path / name), "w") as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, form
        for n in range(3):
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=form)
            frame.pts = n
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    data = (tmp_path / name).read_bytes()
    if codec == "libvpx-vp9" and b"\x53\xc0" not in data:
        pytest.skip("this FFmpeg writes no AlphaMode")
    frame = np.asarray(Loader().video(data).frames[-1], int)
    assert np.abs(frame[24, 5] - (255, 255, 255)).max() < 8
    assert np.abs(frame[24, 60] - (255, 0, 0)).max() < 8


def test_a_video_is_not_its_cover_image(tmp_path: Path) -> None:
    """A song with a cover became a video of one frame."""
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as out:
        audio = out.add_stream("aac", rate=44100)
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32)))
        frame.pts = 0
        out.mux(cover.encode(frame))
        sound = av.AudioFrame.from_ndarray(
            np.zeros((2, 1024), np.float32), format="fltp", layout="stereo"
        )
        sound.sample_rate, sound.pts = 44100, 0
        out.mux(audio.encode(sound))
        for stream in (audio, cover):
            out.mux(stream.encode())
    with pytest.raises(MediaError, match="no video track"):
        Loader().video(tmp_path / "a.m4a")


def test_many_keyframes_take_linear_time(tmp_path: Path) -> None:
    """100,000 keyframes took minutes: the smallest was searched again for each frame."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        frame = av.VideoFrame.from_image(Image.new("RGB", (16, 16)))
        frame.pts = 0
        (packet, *_) = stream.encode(frame)
        for n in range(100_000):
            copy = av.Packet(bytes(packet))
            copy.stream, copy.pts, copy.dts, copy.is_keyframe = stream, n, n, True
            copy.time_base = packet.time_base
            out.mux(copy)
    began = time.monotonic()
    assert len(Loader().video(path, FrameSampling(frames=4)).frames) == 4
    assert time.monotonic() - began < 30
    with pytest.raises(MediaError, match="more than the limit of 5,000 packets"):
        Loader(Limits(video_packets=5000)).video(path)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A server that has a video and an image under names without a suffix; it counts requests."""
    bodies = {"/clip": ramp(tmp_path / "a.mp4").read_bytes(), "/photo": saved(NOISE, "PNG")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            body = bodies[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    requests.clear()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}"
    http.shutdown()
    http.server_close()


requests: list[str] = []


def test_videos_by_address(site: str, tiny: Path) -> None:
    """A download below 32 MB was opened for writing, which failed for every video."""
    from llava_interleave.processing import Processor

    limits = Limits(allow_private=True)
    assert numbers(Loader(limits).video(f"{site}/clip", FrameSampling(frames=3)).frames) == [
        0,
        19,
        39,
    ]
    processor = Processor.from_folder(tiny, limits=limits)
    requests.clear()
    turn = [{"role": "user", "content": content("What?", [f"{site}/clip", f"{site}/photo"])}]
    prompt = processor.prompt(turn)
    assert [m.name for m in prompt.media] == ["video 1", "image 2"]
    assert sorted(requests) == [
        "/clip",
        "/photo",
    ]  # the first bytes decide, without a second request
    with pytest.raises(MediaError, match="this is a video, not an image"):
        Loader(limits).image(f"{site}/clip")


def test_file_urls_of_windows() -> None:
    for url in ("file:///C:/a%20b/c.png", "file://C:/a%20b/c.png", "file:///C|/a%20b/c.png"):
        assert _file_url_path(url, windows=True) == "C:/a b/c.png"
    assert _file_url_path("file:///C:/a.png", windows=False) == "/C:/a.png"
    assert _file_url_path("file://localhost/a.png", windows=True) == "/a.png"
    with pytest.raises(LlavaError, match="another machine"):
        _file_url_path("file://server/share/a.png", windows=True)


def test_forgiving_base64() -> None:
    data = saved(NOISE, "PNG")
    plain = base64.b64encode(data).decode()
    lines = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    for text in (plain, lines, plain.rstrip("="), base64.urlsafe_b64encode(data).decode()):
        assert np.array_equal(read_url(f"data:image/png;base64,{text}"), np.asarray(NOISE))


def read_url(url: str) -> np.ndarray:
    return np.asarray(Loader().image(url))


def test_is_video_looks_at_bytes_only() -> None:
    assert not is_video(b"")
    assert not is_video(saved(NOISE, "JPEG"))
    assert is_video(b"\0\0\0\x18ftypmp42\0\0\0\0isommp42")
    assert not is_video(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic")
    assert not is_video(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
