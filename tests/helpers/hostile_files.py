"""Images and videos that are slow to read, made in memory."""

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
from PIL import Image


def key_frames(count: int, container: str = "matroska", rate: int = 60) -> bytes:
    """A video of nothing but key frames, of a few bytes each."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream("mjpeg", rate=rate)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuvj420p"
        black = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        data = bytes([*stream.encode(black), *stream.encode(None)][0])
        for number in range(count):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, rate)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            file.mux(packet)
    return out.getvalue()


def many_samples(count: int) -> bytes:
    """A kilobyte of MP4 that promises so many samples: FFmpeg makes a list of them all."""
    data = bytearray(key_frames(1, "mp4"))
    for kind, numbers in (
        (b"stsz", (0, 1, count)),
        (b"stts", (0, 1, count, 1)),
        (b"stsc", (0, 1, 1, count, 1)),
    ):
        struct.pack_into(f">{len(numbers)}I", data, data.index(kind) + 4, *numbers)
    return bytes(data)


def gif(frames: int, size: int) -> bytes:
    out = io.BytesIO()
    Image.new("P", (size, size)).save(out, "GIF")
    data = out.getvalue()
    at = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    head = data[: 13 + 3 * 2 ** ((data[10] & 7) + 1)]
    return head + (b"\x21\xf9\x04\0\x05\0\0\0" + data[at:-1]) * frames + b"\x3b"


def scans(count: int, size: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    out = io.BytesIO()
    Image.effect_noise((size, size), 20).save(out, "JPEG", progressive=True, quality=5)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def with_segments(segment: bytes, megabytes: int = 20) -> bytes:
    """A JPEG with so many megabytes of a segment before its image."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    data = out.getvalue()
    return data[:2] + segment * (megabytes * 1_000_000 // max(1, len(segment))) + data[2:]


def filled_scan(megabytes: int = 20, fill: bytes = b"\xff") -> bytes:
    """A JPEG whose data ends in nothing but `fill`."""
    return with_segments(b"", 0)[:-2] + fill * (megabytes * 1_000_000 // len(fill))


def png_chunks(megabytes: int = 20) -> bytes:
    """A PNG of empty chunks."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    empty = struct.pack(">I4sI", 0, b"teSt", zlib.crc32(b"teSt"))
    return out.getvalue()[:33] + empty * (megabytes * 1_000_000 // 12) + out.getvalue()[33:]


def tiff(*tags: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    """A TIFF of one directory: eight bits of gray, and more tags of (tag, type, count), which have
    their values at the file's beginning.
    """
    own = {256: size[0], 257: size[1], 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: size[1]}
    entries = [(tag, 4, 1, value) for tag, value in {**own, 279: size[0] * size[1]}.items()]
    entries += [(*tag, 8) for tag in tags]
    longest = max(count for _, _, count, _ in entries)
    data = b"II*\0" + struct.pack("<I", 8 + 4 * longest + 64) + bytes(4 * longest + 64)
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return data + struct.pack("<H", len(entries)) + packed + bytes(4)


def bmp(width: int, height: int, runs: bytes) -> bytes:
    """A BMP of eight bits in run-length coding."""
    own = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    start = 14 + len(own) + 1024
    head = b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start)
    return head + own + bytes(1024) + runs


def webp(size: int) -> bytes:
    """Forty bytes of size * size pixels."""
    out = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(out, "WEBP", lossless=True, method=0)
    return out.getvalue()


def gif_extension(block: bytes, label: bytes = b"\xfe", megabytes: int = 20) -> bytes:
    """A GIF of an extension with so many megabytes of equal sub-blocks."""
    extension = b"\x21" + label + block * (megabytes * 1_000_000 // len(block)) + b"\0"
    data = gif(1, 8)
    at = 13 + 3 * (2 << (data[10] & 7))
    return data[:at] + extension + data[at:]
