"""Bounds the parts of an image file before Pillow opens it.

Pillow walks markers, chunks and blocks in Python, and joins the comments of a GIF in quadratic
time: some megabytes of empty parts would hold a thread, and the interpreter, for minutes.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, Literal

from ..errors import MediaError

MAX_SEGMENTS = 50_000
"""Markers of a JPEG, bytes between them, chunks of a PNG (of 8 KB where libpng writes them)."""
PNG_PIXELS, MAX_PNG_METADATA = (b"IDAT", b"fcTL", b"fdAT"), 1000
"""Chunks of a PNG with pixels, and how many others it may have: a text takes 20 us and memory."""
MAX_GIF_BLOCKS = 1_000_000
"""Sub-blocks of a GIF, of at most 255 bytes each."""
MAX_COMMENT_BLOCKS = 4096
"""Sub-blocks of a GIF's comments: a megabyte."""
JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")
"""A marker with a length, or the end of the image, among entropy-coded data."""
JPEG_END, JPEG_FILLING = re.compile(rb"\xff\xd9"), re.compile(rb"\xff\xff")
MAX_EXIF = 100
"""Segments of a JPEG's EXIF, which Pillow joins in quadratic time."""
MANY_SCANS = 20
"""Scans of a JPEG that are always fine: a progressive one has about ten."""
MAX_SCANNED_PIXELS = 1_000_000_000
"""Scans of a JPEG, times its pixels."""
MAX_PLAIN_HEADER, MAX_PLAIN_MARKERS = 1 << 16, 100
"""Bytes before the scans of a JPEG that is known without Pillow, and markers from there on."""
MAX_TIFF_TAGS, MAX_TIFF_VALUES = 1000, 500_000
"""Tags of a TIFF, and their numbers: two for each strip or tile of the image."""
TIFF_BYTES = (1, 2, 7)
"""Types of tags that are read as they are: BYTE, ASCII, UNDEFINED."""
BMP_INFO_HEADER, BMP_RLE = 40, (1, 2)
"""Bytes of the shortest header that names a compression, and those of run-length coding."""
MAX_RLE_PIXELS, RLE_BYTES = 2_000_000, 4
"""Pixels of a BMP in run-length coding, decoded in a second, and bytes of each: in a column of
single pixels each one has its own run and the end of its line."""
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
WINDOW = 1 << 14
"""Bytes that are searched at a time: the interpreter's lock is held for that long, and 20 MB at
once would stop every other thread for up to a second."""
OTHER_CODING = re.compile(rb"\xff[\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]")
"""The start of a JPEG frame that is not in baseline, extended or progressive Huffman coding."""


def check_segments(file: BinaryIO, kind: str) -> None:
    """Raises MediaError for an image with too many parts. The file is at its start after it."""
    file.seek(0)
    if kind == "JPEG":
        jpeg_scans(file)
    elif kind == "PNG":
        _check_png(file)
    elif kind == "GIF":
        _check_gif(file.read())
    elif kind == "TIFF":
        _check_tiff(file)
    elif kind == "BMP":
        _check_bmp(file)
    file.seek(0)


def check_scans(file: BinaryIO, width: int, height: int) -> None:
    """Raises MediaError for a JPEG of many scans: each is decoded over the whole image."""
    position = file.tell()
    file.seek(0)
    scans = jpeg_scans(file)
    file.seek(position)
    if scans > MANY_SCANS and scans * width * height > MAX_SCANNED_PIXELS:
        raise MediaError(f"the JPEG has {scans} scans of {width} x {height} pixels")


def is_whole(data: bytes, kind: str) -> bool:
    """Whether an image's file is seen to be whole without decoding it: a JPEG in Huffman coding
    that ends with its end marker, a PNG with right checksums up to its end.

    Another file may be whole, too.
    """
    if kind == "JPEG":
        ends = data.rstrip(b"\0").endswith(b"\xff\xd9")
        return ends and next(_matches(OTHER_CODING, data, 0, len(data)), None) is None
    at = 8
    while kind == "PNG" and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at = end + 4
    return False


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a whole JPEG in Huffman coding with the usual parts alone, of their usual
    sizes; None for any other file.

    Pillow opens such a file, and `check_segments` and `check_scans` allow it.
    """
    at, size, tables = 2, None, 0
    while at + 20 < min(len(data), MAX_PLAIN_HEADER) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == START_OF_SCAN:
            found = next(_matches(JPEG_END, data, at, len(data)), None)
            end = found.start() if found else 0
            parts = islice(_matches(JPEG_MARKER, data, at, end), MAX_PLAIN_MARKERS + 1)
            markers = [part[0] for part in parts]
            few = len(markers) <= MAX_PLAIN_MARKERS and markers.count(b"\xff\xda") <= MANY_SCANS
            whole = end > at + length and not data[end + 2 :].strip(b"\0")
            plain = few and whole and tables and not any(_matches(JPEG_FILLING, data, at, end))
            return size if plain else None
        if marker in (0xC0, 0xC2):
            channels = data[at + 9]
            if size or channels not in (1, 3) or (data[at + 4], length) != (8, 8 + 3 * channels):
                return None
            size = (
                int.from_bytes(data[at + 7 : at + 9], "big"),
                int.from_bytes(data[at + 5 : at + 7], "big"),
            )
            if not all(size):
                return None
        elif marker == 0xDB and length in (67, 132) and not data[at + 4] & 0xF0:
            tables += 1
        elif not (
            (marker == 0xC4 and length > 18)
            or (marker == 0xE0 and length >= 16 and data.startswith(b"JFIF\0", at + 4))
            or (marker == 0xE2 and length > 16 and data.startswith(b"ICC_PROFILE\0", at + 4))
        ):
            return None
        at += 2 + length
    return None


def jpeg_scans(file: BinaryIO) -> int:
    """The scans of a JPEG up to its end. Raises MediaError for too many markers."""
    data, at, scans, skipped, exif = file.read(), 2, 0, 0, 0
    for _ in range(MAX_SEGMENTS):
        stop = len(data) if scans else min(len(data), at + MAX_SEGMENTS + 2)
        match = next(_matches(JPEG_MARKER, data, at, stop), None)
        start, end = match.span() if match else (max(at, len(data)), 0)
        # Until the first scan nothing comes between segments but filling. Later it is data, in
        # which libjpeg starts over at a run of filling with each block that Pillow hands it.
        if scans:
            filling = _matches(JPEG_FILLING, data, at, start + 1)
            skipped += sum(1 for _ in islice(filling, MAX_SEGMENTS + 1))
        else:
            skipped += start - at
        if match is None or skipped > MAX_SEGMENTS:
            break
        marker = data[end - 1]
        if scans and marker == END_OF_IMAGE:
            break
        scans += marker == START_OF_SCAN
        exif += data.startswith(b"Exif\0\0", end + 2)
        if exif > MAX_EXIF:
            raise MediaError(f"the JPEG has more than the limit of {MAX_EXIF} segments of EXIF")
        length = 0 if marker == END_OF_IMAGE else int.from_bytes(data[end : end + 2], "big")
        at = end + length
    else:
        skipped = MAX_SEGMENTS + 1
    if skipped > MAX_SEGMENTS:
        raise MediaError(f"the JPEG has more than the limit of {MAX_SEGMENTS:,} segments")
    return scans


def _matches(
    pattern: re.Pattern[bytes], data: bytes, start: int, stop: int
) -> Iterator[re.Match[bytes]]:
    """Matches of two bytes, searched in windows."""
    for at in range(start, stop, WINDOW):
        yield from pattern.finditer(data, at, min(at + WINDOW + 1, stop))


def _check_png(file: BinaryIO) -> None:
    at, size = 8, file.seek(0, os.SEEK_END)
    metadata = 0
    for _ in range(MAX_SEGMENTS):
        file.seek(at)
        head = file.read(8)
        at += 12 + int.from_bytes(head[:4], "big")
        if at >= size or head[4:] == b"IEND":
            return
        metadata += head[4:] not in PNG_PIXELS
        if metadata > MAX_PNG_METADATA:
            break
    raise MediaError(
        f"the PNG has more than the limit of {MAX_SEGMENTS:,} chunks, or {MAX_PNG_METADATA:,} "
        "of metadata"
    )


def _check_gif(data: bytes) -> None:
    at, blocks, comments = 13, 0, 0
    at += _color_table(data, 10)
    while at < len(data):
        introducer, comment = data[at], False
        if introducer == 0x21:  # an extension
            comment, at = data[at + 1 : at + 2] == b"\xfe", at + 2
        elif introducer == 0x2C:  # an image
            at += 11 + _color_table(data, at + 9)
        elif introducer == 0x3B:  # the end
            return
        else:  # Pillow goes on byte by byte
            at += 1
            blocks += 1
        while introducer in (0x21, 0x2C) and at < len(data) and data[at]:
            at += data[at] + 1
            blocks += 1
            comments += comment
            if blocks > MAX_GIF_BLOCKS or comments > MAX_COMMENT_BLOCKS:
                break
        at += introducer in (0x21, 0x2C)
        comments += comment
        blocks += 1
        if blocks > MAX_GIF_BLOCKS or comments > MAX_COMMENT_BLOCKS:
            raise MediaError(
                f"the GIF has more than the limit of {MAX_GIF_BLOCKS:,} blocks, or "
                f"{MAX_COMMENT_BLOCKS:,} of comments"
            )


def _check_tiff(file: BinaryIO) -> None:
    """Pillow reads the values of all tags of the first directory, as Python's numbers."""
    head = file.read(16)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"

    def number(data: bytes) -> int:
        return int.from_bytes(data, order)

    big = number(head[2:4]) == 43
    wide, entry = (8, 20) if big else (2, 12)
    file.seek(number(head[8:16] if big else head[4:8]))
    tags = number(file.read(wide))
    if tags > MAX_TIFF_TAGS:
        raise MediaError(f"the TIFF has {tags:,} tags, more than the limit of {MAX_TIFF_TAGS:,}")
    values = 0
    for _ in range(tags):
        data = file.read(entry)
        if number(data[2:4]) not in TIFF_BYTES:
            values += number(data[4:12] if big else data[4:8])
    if values > MAX_TIFF_VALUES:
        raise MediaError(
            f"the tags of the TIFF have more than the limit of {MAX_TIFF_VALUES:,} values"
        )


def _check_bmp(file: BinaryIO) -> None:
    """Pillow decodes run-length coding in Python, two bytes at a time or pixel by pixel."""
    head = file.read(34).ljust(34, b"\0")
    header, width, height, _, compression = struct.unpack_from("<IiiII", head, 14)
    size, pixels = file.seek(0, os.SEEK_END), abs(width * height)
    limit = min(pixels, MAX_RLE_PIXELS)
    if header < BMP_INFO_HEADER or compression not in BMP_RLE:
        return
    if pixels > limit or size > RLE_BYTES * limit + MAX_PLAIN_HEADER:
        raise MediaError(
            f"the BMP has {pixels:,} pixels in {size:,} bytes of run-length coding; the limit is "
            f"{MAX_RLE_PIXELS:,} pixels of {RLE_BYTES} bytes: save it as PNG"
        )


def _color_table(data: bytes, at: int) -> int:
    """Bytes of the color table that the flags at this place announce."""
    flags = data[at] if at < len(data) else 0
    return 3 * (2 << (flags & 7)) if flags & 0x80 else 0
