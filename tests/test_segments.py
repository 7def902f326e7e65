"""Bounds of the parts of image files: lawful files pass, files of nothing but parts do not."""

import contextlib
import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from llava_interleave.errors import MediaError
from llava_interleave.processing import Limits, Loader
from llava_interleave.processing import segments as module
from llava_interleave.processing.segments import (
    check_scans,
    check_segments,
    is_whole,
    jpeg_scans,
    plain_jpeg,
)
from tests.helpers.hostile_files import (
    bmp,
    filled_scan,
    gif_extension,
    png_chunks,
    scans,
    tiff,
    with_segments,
)

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))


def saved(kind: str, image: Image.Image = NOISE, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


TEXTS = PngInfo()
for number in range(1001):
    TEXTS.add_itxt(f"key {number}", "text")

LAWFUL = {
    "baseline": (saved("JPEG", quality=95), 1),
    "restarts": (saved("JPEG", restart_marker_blocks=1), 1),
    "progressive": (saved("JPEG", progressive=True), 10),
    "metadata": (
        saved("JPEG", exif=b"Exif\0\0" + b"\xff\xd9" * 9000, icc_profile=b"\xff" * 70000),
        1,
    ),
    "comment": (saved("JPEG", comment=b"\xff\xda" * 100), 1),
    "trailer": (saved("JPEG") + b"\xff\xda\0\0" * 1000, 1),
    "filling": (with_segments(b"", 0)[:2] + b"\xff" * 100 + with_segments(b"", 0)[2:], 1),
}


@pytest.mark.parametrize("name", LAWFUL)
def test_scans_of_a_lawful_jpeg_are_counted_up_to_its_end(name: str) -> None:
    data, count = LAWFUL[name]
    file = io.BytesIO(data)
    check_segments(file, "JPEG")
    assert file.tell() == 0
    assert jpeg_scans(file) == count
    assert Loader(Limits()).image(data).size in ((400, 300), (8, 8))


def test_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data is searched piece by piece, so that other threads run meanwhile."""
    random = np.random.default_rng(0)
    head = saved("JPEG")[: saved("JPEG").index(b"\xff\xda") + 14]
    values = np.array([0, 1, 0xD0, 0xD9, 0xDA, 0xE0, 0xFF], np.uint8)
    chances = [0.4, 0.2, 0.1, 0.001, 0.002, 0.002, 0.295]
    files = [head + random.choice(values, 3000, p=chances).tobytes() for _ in range(50)]
    files += [data for data, _ in LAWFUL.values()]
    files += [data.replace(b"\xff\xff", b"\xff\0") + b"\xff\xd9" for data in files]

    def read() -> list[object]:
        return [
            (plain_jpeg(data), is_whole(data, "JPEG"), jpeg_scans(io.BytesIO(data)))
            for data in files
        ]

    found = read()
    monkeypatch.setattr(module, "WINDOW", 3)
    assert read() == found and len(set(found)) > 5


def test_a_jpeg_of_markers_takes_no_more_memory_than_the_file() -> None:
    """Twenty megabytes of markers were found all at once: 5 s and half a gigabyte, and no other
    thread ran."""
    head = saved("JPEG")[: saved("JPEG").index(b"\xff\xda") + 14]
    data = head + b"\xff\xe5" * 2_000_000 + b"\xff\xd9"
    tracemalloc.start()
    assert plain_jpeg(data) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(data)


def test_many_scans_of_a_large_image_are_refused() -> None:
    data = scans(300, 64)
    assert jpeg_scans(io.BytesIO(data)) > 300
    check_scans(io.BytesIO(data), 64, 64)
    with pytest.raises(MediaError, match="scans of 2000 x 2000"):
        check_scans(io.BytesIO(data), 2000, 2000)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("GIF", saved("GIF", comment=b"made by hand " * 100)),
        ("GIF", saved("GIF", save_all=True, append_images=[NOISE.rotate(90)] * 20, loop=0)),
        ("PNG", saved("PNG")),
        ("PNG", saved("PNG", save_all=True, append_images=[NOISE.rotate(90)] * 20)),
        ("TIFF", saved("TIFF", compression="tiff_lzw")),
        ("TIFF", saved("TIFF", big_tiff=True, icc_profile=b"x" * 2_000_000)),
        ("TIFF", tiff((700, 7, 1_000_000), size=(400, 300))),
        ("BMP", saved("BMP")),
        ("BMP", bmp(400, 300, (b"\1\7" * 400 + b"\0\0") * 300 + b"\0\1")),
    ],
)
def test_lawful_files_pass(kind: str, data: bytes) -> None:
    file = io.BytesIO(data)
    check_segments(file, kind)
    assert file.tell() == 0
    assert Loader(Limits()).image(data).size == (400, 300)


@pytest.mark.parametrize(
    ("kind", "data", "match"),
    [
        ("JPEG", with_segments(b"\xff", 1), "segments"),
        ("JPEG", with_segments(b"\xff\xd9", 1), "segments"),
        ("JPEG", with_segments(b"\0", 1), "segments"),
        ("JPEG", with_segments(b"\xff\xe5\0\2", 1), "segments"),
        ("JPEG", filled_scan(1), "segments"),
        ("PNG", png_chunks(1), "chunks"),
        ("PNG", saved("PNG", pnginfo=TEXTS), "1,000 of metadata"),
        ("GIF", gif_extension(b"\1x", megabytes=1), "of comments"),
        ("GIF", gif_extension(b"\1x", b"\1", megabytes=3), "blocks"),
        ("GIF", gif_extension(b"\0\x21\xfe\1x", megabytes=1), "of comments"),
        ("TIFF", tiff(*((1000 + i, 2, 10) for i in range(2000))), "2,009 tags"),
        ("TIFF", tiff((273, 4, 1_000_000)), "500,000 values"),
        ("TIFF", tiff(*((1000 + i, 12, 1000) for i in range(900))), "500,000 values"),
        ("BMP", bmp(5500, 5500, b"\1\7\0\0" * 5500), "30,250,000 pixels in 23,078 bytes"),
        ("BMP", bmp(1, 1, b"\5\7" * 500_000), "1 pixels in 1,001,078 bytes"),
    ],
)
def test_a_file_of_nothing_but_parts_is_refused(kind: str, data: bytes, match: str) -> None:
    with pytest.raises(MediaError, match=match):
        check_segments(io.BytesIO(data), kind)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP"])
def test_what_is_cut_short_ends(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses it in words; here it only must not fail in another way."""
    monkeypatch.setattr(module, "MAX_SEGMENTS", 50)
    small = saved(kind, NOISE.resize((20, 20)))
    for length in range(len(small)):
        with contextlib.suppress(MediaError):
            check_segments(io.BytesIO(small[:length]), kind)
