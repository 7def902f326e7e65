"""The frames asked for, found by seeking, are the frames that decoding everything finds."""

import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_interleave.errors import MediaError, MediaRefused, OptionError
from llava_interleave.processing import FrameSampling, Limits, Loader, video
from llava_interleave.processing.video import FrameTimeline

SIZE = (64, 48)
KINDS = {
    "mp4": "libx264",
    "mkv": "libx264",
    "webm": "libvpx-vp9",
    "avi": "mpeg4",
    "ts": "mpeg2video",
    "mov": "mpeg4",
}


def gray_image(index: int) -> Image.Image:
    """A frame that can be told from its neighbours: its grey is its number."""
    return Image.new("RGB", SIZE, (index * 6 % 256,) * 3)


def write_clip(
    path: Path,
    stamps: list[int] | None = None,
    unit: Fraction = Fraction(1, 10),
    codec: str = "",
    gop: int = 8,
) -> Path:
    """A video whose frame i, of grey 6 * i, is shown at stamps[i] * unit seconds."""
    stamps = list(range(40)) if stamps is None else stamps
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec or KINDS[path.suffix[1:]], rate=10)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.bit_rate = 4_000_000
        stream.time_base = stream.codec_context.time_base = unit
        for i, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_image(gray_image(i))
            frame.pts, frame.time_base = stamp, unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def greys(frames: list[Image.Image]) -> list[int]:
    return [round(float(np.asarray(frame).mean()) / 6) for frame in frames]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {kind: write_clip(folder / f"clip.{kind}") for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_seeking_finds_the_frames_of_every_container(videos: dict[str, Path], kind: str) -> None:
    clip = Loader().video(videos[kind], FrameSampling(frames=5))
    assert greys(clip.frames) == [0, 9, 19, 29, 39]
    assert clip.times == pytest.approx([0, 0.9, 1.9, 2.9, 3.9])
    assert clip.duration == pytest.approx(4.0)
    for wanted in ([0], [39], [7, 8, 9], [15, 31], list(range(40))):
        clip = Loader().video(videos[kind], FrameSampling(times=tuple(i / 10 for i in wanted)))
        assert greys(clip.frames) == wanted
    whole = Loader().video(videos[kind], FrameSampling(frames=16))
    assert Loader().video_times(videos[kind], FrameSampling(frames=16)) == type(clip)(
        [], whole.times, whole.duration
    )


def test_bytes_urls_and_paths_are_one(videos: dict[str, Path]) -> None:
    data = videos["mp4"].read_bytes()
    expected = Loader().video(videos["mp4"]).times
    assert len(expected) == 16
    assert Loader().video(data).times == Loader().video(videos["mp4"].as_uri()).times == expected


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (FrameSampling(fps=1), [0, 10, 20, 30]),
        (FrameSampling(fps=2, start=1, end=2), [10, 15, 20]),
        (FrameSampling(fps=10, frames=3), [0, 19, 39]),
        (FrameSampling(fps=1000, frames=1000, start=3.65), [36, 37, 38, 39]),
        (FrameSampling(frames=1), [0]),
        (FrameSampling(frames=2), [0, 39]),
        (FrameSampling(frames=100), list(range(40))),
        (FrameSampling(frames=3, start=2), [20, 29, 39]),
        (FrameSampling(frames=3, end=0.1), [0, 1]),
        (FrameSampling(end=0.0), [0]),
        (FrameSampling(times=(0.3, 0.35, 0.1, 0.3)), [1, 3]),
    ],
)
def test_samplings(videos: dict[str, Path], sampling: FrameSampling, wanted: list[int]) -> None:
    assert greys(Loader().video(videos["mp4"], sampling).frames) == wanted


def test_moments_outside_the_video(videos: dict[str, Path]) -> None:
    for sampling in (FrameSampling(times=(9.0,)), FrameSampling(start=9)):
        with pytest.raises(OptionError, match=r"9 s is past the video's last frame at 3\.90 s"):
            Loader().video(videos["mp4"], sampling)


CLOCKS = st.lists(st.integers(0, 10**6), min_size=1, max_size=60, unique=True).map(sorted)


@given(
    CLOCKS,
    st.integers(1, 80),
    st.sampled_from([Fraction(1, 90000), Fraction(1, 1000), Fraction(1001, 30000)]),
)
def test_uniform_frames_are_distinct_and_have_both_ends(
    stamps: list[int], frames: int, unit: Fraction
) -> None:
    """The original demo divided by zero for a video shorter than the frames asked for, and gave the
    early part of others.
    """
    chosen = FrameSampling(frames=frames).choose(FrameTimeline(stamps, unit), 100)
    assert chosen[0] == 0
    assert all(a < b for a, b in pairwise(chosen))
    assert len(chosen) == len(stamps) if len(stamps) <= frames else len(chosen) <= frames
    assert frames == 1 or chosen[-1] == len(stamps) - 1


@given(st.integers(2, 500), st.integers(2, 64))
def test_at_a_constant_rate_the_frames_are_those_of_the_training_code(
    total: int, frames: int
) -> None:
    """Source: LLaVA-NeXT llava/train/train.py: np.linspace(0, total - 1, frames, dtype=int)."""
    chosen = FrameSampling(frames=frames).choose(FrameTimeline(range(total), Fraction(1, 25)), 100)
    assert chosen == sorted(
        {i * (total - 1) // (frames - 1) for i in range(frames)} if total > frames else range(total)
    )


def test_a_short_video(tmp_path: Path) -> None:
    clip = Loader().video(write_clip(tmp_path / "a.mp4", [0, 1, 2]), FrameSampling(frames=16))
    assert greys(clip.frames) == [0, 1, 2]
    one = Loader().video(write_clip(tmp_path / "b.mp4", [0]), FrameSampling(frames=16))
    assert (one.times, one.duration) == ([0.0], 0.0)


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_variable_rate(tmp_path: Path, kind: str) -> None:
    """Frame i is not at i / rate: half of this video's frames lie in its first second."""
    stamps = [*range(0, 1000, 50), *range(1000, 11000, 500)]
    path = write_clip(tmp_path / f"v.{kind}", stamps, Fraction(1, 1000))
    clip = Loader().video(path, FrameSampling(times=(0.5, 5.2, 10.5)))
    assert (greys(clip.frames), clip.times) == ([10, 28, 39], [0.5, 5.0, 10.5])
    assert greys(Loader().video(path, FrameSampling(frames=3)).frames) == [0, 28, 39]


def test_a_video_that_was_written_live_has_no_duration(tmp_path: Path) -> None:
    data = bytearray(write_clip(tmp_path / "a.mkv").read_bytes())
    at = data.find(b"\x44\x89")  # the Duration element, overwritten by a Void one
    data[at : at + 11] = b"\xec\x89" + bytes(9)
    assert greys(Loader().video(bytes(data), FrameSampling(frames=3)).frames) == [0, 19, 39]


def test_a_video_that_begins_late(tmp_path: Path) -> None:
    clip = Loader().video(
        write_clip(tmp_path / "a.ts", list(range(500, 520))), FrameSampling(frames=3)
    )
    assert clip.times == pytest.approx([0, 0.9, 1.9])


def test_seeking_decodes_a_fraction_of_a_long_video(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "long.mp4", list(range(400)), gop=10)
    sampling = FrameSampling(times=(39.0,))
    assert len(Loader(Limits(decoded_frames=40)).video(path, sampling).frames) == 1
    with pytest.raises(MediaError, match="more than the limit of 40 frames"):
        Loader(Limits(decoded_frames=40)).video(path, FrameSampling(frames=30))


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_of_phones_is_applied(tmp_path: Path, turn: int) -> None:
    """Phones record sideways and write a matrix; read without it, every upright video lies on its
    side.
    """
    left = Image.new("RGB", SIZE, "black")
    left.paste("white", (0, 0, 20, SIZE[1]))
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_image(left)))
        out.mux(stream.encode())
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    data[matrix : matrix + 20] = struct.pack(">5i", cos << 16, sin << 16, 0, -sin << 16, cos << 16)
    frame = Loader().video(bytes(data)).frames[0]
    # The file says: turned clockwise by `turn` for display; the white left edge moves along.
    expected = left.rotate(-turn, expand=True)
    assert frame.size == expected.size
    assert np.abs(np.asarray(frame, int) - np.asarray(expected, int)).mean() < 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animations(kind: str) -> None:
    file = BytesIO()
    durations = [100, 100, 300, 100]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    gray_image(0).save(
        file,
        kind,
        save_all=True,
        append_images=[gray_image(i) for i in (10, 20, 30)],
        duration=durations,
        **options,
    )
    clip = Loader().video(file.getvalue())
    assert (greys(clip.frames), clip.times, clip.duration) == (
        [0, 10, 20, 30],
        [0, 0.1, 0.2, 0.5],
        0.6,
    )
    assert greys(Loader().video(file.getvalue(), FrameSampling(times=(0.45,))).frames) == [20]
    assert len(Loader().video_times(file.getvalue(), FrameSampling(frames=2)).times) == 2


def test_folders_and_lists_of_frames(tmp_path: Path) -> None:
    for i in (1, 2, 10, 3):
        gray_image(i).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / ".hidden.png").write_text("no frame")
    clip = Loader().video(tmp_path)
    assert (greys(clip.frames), clip.times, clip.duration) == ([1, 2, 3, 10], [0, 0.5, 1, 1.5], 2.0)
    assert greys(
        Loader().video([gray_image(i) for i in range(9)], FrameSampling(frames=3)).frames
    ) == [0, 4, 8]
    assert greys(Loader().video(np.stack([np.asarray(gray_image(i)) for i in (4, 5)])).frames) == [
        4,
        5,
    ]
    wrong: Any
    for wrong in ([], tmp_path / "absent", gray_image(1)):
        with pytest.raises(MediaError):
            Loader().video(wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="holds no images"):
        Loader().video(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "avi"])
def test_a_truncated_video_is_not_read_as_a_shorter_one(videos: dict[str, Path], kind: str) -> None:
    data = videos[kind].read_bytes()
    for part in (0.2, 0.5, 0.9):
        with pytest.raises(MediaError, match="cut short"):
            Loader().video(data[: int(len(data) * part)])


@pytest.mark.parametrize("kind", KINDS)
def test_damage_gives_frames_or_a_media_error(videos: dict[str, Path], kind: str) -> None:
    data = videos[kind].read_bytes()
    for seed in range(15):
        blob = bytearray(data)
        random = np.random.default_rng(seed)
        for at in random.integers(16, len(blob), 30):
            blob[at] = random.integers(256)
        with suppress(MediaError):
            assert Loader().video(bytes(blob)).frames


def test_invalid_videos() -> None:
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n"
    file = BytesIO()
    gray_image(0).save(file, "PNG")
    for data in (
        b"",
        b"hello",
        playlist,
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        file.getvalue(),
        b"RIFF1234AVI " + bytes(600),
    ):
        with pytest.raises(MediaError):
            Loader().video(data)
    with pytest.raises(MediaError):
        Loader().video(b"\0\0\0\x18ftypisom" + playlist * 20)


def test_large_videos_are_decoded_one_at_a_time(
    videos: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of 31 megapixels with 16 reference frames took 5 GB. The wait counts for no limit."""
    inside, most = [], []

    def slowly(frame: Image.Image) -> Image.Image:
        inside.append(frame)
        most.append(len(inside))
        time.sleep(0.03)
        inside.pop()
        return frame

    def read(_: int) -> int:
        loader = Loader(Limits(video_work_seconds=1.2))
        return len(loader.video(videos["mp4"], FrameSampling(frames=8), each=slowly).frames)

    def together() -> int:
        most.clear()
        with ThreadPoolExecutor(8) as pool:  # the last one waits 1.7 s
            assert list(pool.map(read, range(8))) == [8] * 8
        return max(most)

    assert together() > 1
    monkeypatch.setattr(video, "LARGE", 64 * 48 - 1)
    assert together() == 1


def test_limits_of_videos(videos: dict[str, Path]) -> None:
    for limits, message in (
        (Limits(video_seconds=3), "lasts 4 s, the limit is 3 s"),
        (Limits(image_pixels=100), "64 x 48 pixels"),
        (Limits(video_bytes=1000), "more than the limit of 1,000 bytes"),
    ):
        with pytest.raises(MediaError, match=message):
            Loader(limits).video(videos["mp4"])
    with pytest.raises(OptionError, match="than the limit of 4"):
        Loader(Limits(video_frames=4)).video(videos["mp4"], FrameSampling(frames=5))
    with pytest.raises(OptionError, match="than the limit of 4"):
        Loader(Limits(video_frames=4)).video(videos["mp4"], FrameSampling(fps=1e9, frames=10**12))
    with pytest.raises(MediaRefused):
        Loader(Limits(allow_local_files=False)).video(videos["mp4"].parent)
