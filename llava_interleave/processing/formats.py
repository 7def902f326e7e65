"""The format of a file by its first bytes, never by its name. Opens and decodes nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import BinaryIO

from .. import data_url

HEAD = 512
"""First bytes that decide a format."""
IMAGES = "JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or HEIC"
VIDEOS = "MP4/MOV, WEBM/MKV, AVI, MPEG-TS, animated GIF, WEBP, PNG or AVIF"
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".avifs",
    ".heic", ".heif", ".hif",
)  # fmt: skip
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".webm", ".mkv", ".avi", ".ts", ".mts", ".m2ts",
)  # fmt: skip
FRAME_NAME = re.compile(r"((?:frames?|frm|out|f)?[-_ .]?)(\d+)", re.IGNORECASE)
MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"pnot", b"styp", b"moof")
MAX_PNG_CHUNKS = 10_000
"""Chunks before the image data among which the animation control chunk is searched."""
AVIF_BRANDS = {b"avif", b"avis", b"avio"}
HEIF_BRANDS = {
    b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2",
    b"msf1", b"miaf", b"avci", b"avcs", b"jpeg", b"jpgs", b"j2ki", b"j2is", b"vvic", b"vvis",
}  # fmt: skip
"""Brands of ISO/IEC 23008-12 (HEIF) and its coding formats."""
HEIF_SEQUENCES = {b"hevc", b"hevx", b"hevm", b"hevs", b"msf1", b"avcs", b"jpgs", b"j2is", b"vvis"}
"""Major brands of files whose main content is a track of frames."""
NOT_VIDEO_BRANDS = {b"crx ", b"jxl ", b"jp2 ", b"jpx ", b"jpm "}
"""ISO media files with an image in a form that neither Pillow nor FFmpeg reads whole: Canon's raw
files (of whose track FFmpeg shows a part), JPEG XL, JPEG 2000.
"""


def image_format(head: bytes) -> str | None:
    """Pillow's name of the format of a file with these first bytes; HEIF is pillow-heif's."""
    for magic, name in (
        (b"\xff\xd8\xff", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"GIF87a", "GIF"),
        (b"GIF89a", "GIF"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"II+\0", "TIFF"),
        (b"MM\0+", "TIFF"),
        (b"BM", "BMP"),
    ):
        if head.startswith(magic):
            return name
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    major, brands = _brands(head)
    if brands & AVIF_BRANDS and (major in AVIF_BRANDS | HEIF_BRANDS):
        return "AVIF"
    return "HEIF" if major in HEIF_BRANDS - HEIF_SEQUENCES else None


def video_format(head: bytes) -> str | None:
    """FFmpeg's name of the format of a file with these first `HEAD` bytes."""
    if head[4:8] in MOV_BOXES and image_format(head) is None:
        return None if _brands(head)[1] & NOT_VIDEO_BRANDS else "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    if len(head) >= HEAD and any(
        head[at] == head[at + step] == 0x47 for at, step in ((0, 188), (4, 192))
    ):
        return "mpegts"
    return None


def is_video(data: bytes | BinaryIO) -> bool:
    """Whether a file is a video: a video format, a GIF, or an animated WEBP, PNG or AVIF.

    data: the whole file, from its start; of a long one with a video format `HEAD` bytes are enough.
    """
    head = _read(data, 0, HEAD)
    name = image_format(head)
    if name == "WEBP":
        return head[12:16] == b"VP8X" and bool(head[20] & 2) if len(head) > 20 else False
    if name == "PNG":
        return _is_animated_png(data)
    if name == "AVIF":
        return _brands(head)[0] == b"avis"
    return name == "GIF" or video_format(head) is not None


def is_frame_sequence(names: Sequence[str]) -> bool:
    """Whether the names of a folder's files number the frames of a video: 00001.jpg, frame_12.png.

    Nothing but a number, or frame, frm, out or f before it, in equal steps (of two files: by one).
    Names of cameras (IMG_0001.JPG) number photos.
    """
    stems = [FRAME_NAME.fullmatch(PurePath(name).stem) for name in names]
    numbers = sorted(int(stem[2]) for stem in stems if stem)
    steps = {b - a for a, b in pairwise(numbers)}
    prefixes = {stem[1].lower() for stem in stems if stem}
    return (
        len(numbers) == len(names) > 1
        and len(prefixes) == len(steps) == 1
        and (len(numbers) > 2 or steps == {1})
        and 0 not in steps
    )


def data_url_is_video(url: str) -> bool:
    """`is_video` of a base64 data URL; its media type where its data cannot be read."""
    try:
        data = data_url.decode(url)
    except ValueError:
        data = b""
    if image_format(data) or video_format(data[:HEAD]):
        return is_video(data)
    return url[:64].lower().startswith(("data:video/", "data:image/gif"))


def _brands(head: bytes) -> tuple[bytes, set[bytes]]:
    """The major brand of an ISO media file, and all its brands; nothing for other files."""
    if head[4:8] != b"ftyp":
        return b"", set()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    major = head[8:12]
    return major, {major, *(head[at : at + 4] for at in range(16, end - 3, 4))}


def _is_animated_png(data: bytes | BinaryIO) -> bool:
    """Whether a PNG has its animation control chunk, which stands before the image data."""
    at = 8
    for _ in range(MAX_PNG_CHUNKS):
        chunk = _read(data, at, 12)
        if len(chunk) < 12 or chunk[4:8] in (b"IDAT", b"IEND"):
            return False
        if chunk[4:8] == b"acTL":
            return int.from_bytes(chunk[8:12], "big") > 1
        at += 12 + int.from_bytes(chunk[:4], "big")
    return False


def _read(data: bytes | BinaryIO, at: int, size: int) -> bytes:
    if isinstance(data, bytes):
        return data[at : at + size]
    data.seek(at)
    return data.read(size)
