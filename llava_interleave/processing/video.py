"""Frames of a video at requested times, by keyframe seeks, as FFmpeg shows them.

Reads from an open binary file; knows no sources or models.
"""

from __future__ import annotations

import io
import math
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..errors import MediaError, OptionError
from .limits import Deadline, Limits

MAX_INDEX = 64_000_000
"""Bytes of the index of an MP4."""
MAX_BOXES = 200_000
"""Boxes at the top of an MP4, two for each fragment. FFmpeg and we read them one by one."""
LARGE = 4096 * 2304
"""Pixels of a frame above which one video is decoded at a time: its decoder may keep 16 reference
frames, 1.7 GB at 31 megapixels."""
_large_video = Lock()
UNIFORM, MAX_AT_RATE = 16, 32
Each = Callable[[Image.Image], Image.Image]
"""Applied to each frame as soon as it is decoded, so that large frames do not stay in memory."""
BEGINNING = -(1 << 62)
"""The position of a container that was just opened, where no seek leads."""
MAX_REORDER = 32
"""Packets among which the smallest step between two stamps is one frame."""
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders of codecs whose transparency FFmpeg's own decoders drop."""


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """The choice of a video's frames. A moment stands for the frame on screen; none is taken twice.

    frames: how many, spread evenly in time from the first to the last frame (default: the
        checkpoint's number, else 16); with `fps`, their maximum (default 32).
    fps: frames a second from the first frame on; if that is more than `frames`, `frames` spread
        evenly instead.
    times: exactly these moments, in seconds from the first frame.
    start: the clip begins here, in seconds from the first frame of the video.
    end: the clip ends here.
    """

    frames: int | None = None
    fps: float | None = None
    times: tuple[float, ...] | None = None
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        if self.times is not None and (self.frames, self.fps, self.start, self.end) != (None,) * 4:
            raise OptionError(
                "`times` says everything; frames, fps, start and end cannot be given with it"
            )
        if self.frames is not None and (
            isinstance(self.frames, bool) or not isinstance(self.frames, int) or self.frames < 1
        ):
            raise OptionError(f"frames must be a whole number from 1 on, not {self.frames!r}")
        if self.fps is not None and not (_is_number(self.fps) and _exact(self.fps) > 0):
            raise OptionError(
                f"fps must be a number above 0, at least a millionth, not {self.fps!r}"
            )
        if self.times is not None and not (
            self.times and all(_is_number(t) and t >= 0 for t in self.times)
        ):
            raise OptionError(
                f"times must be one or more numbers of seconds from 0 on, not {self.times!r}"
            )
        for name, value in (("start", self.start), ("end", self.end)):
            if value is not None and not (_is_number(value) and value >= 0):
                raise OptionError(f"{name} must be a number of seconds from 0 on, not {value!r}")
        if self.start is not None and self.end is not None and self.start > self.end:
            raise OptionError(f"start {self.start} s lies after end {self.end} s")

    def choose(self, timeline: FrameTimeline, limit: int) -> list[int]:
        """Indices of the frames, ascending.

        Raises OptionError for moments outside the video, or more frames than `limit`.
        """
        chosen = sorted(
            {timeline.shown_at(moment) for moment in self._moments(timeline, limit + 1)}
        )
        if len(chosen) > limit:
            raise OptionError(
                f"the sampling chooses more frames of a video than the limit of {limit}; "
                "choose fewer (Limits.video_frames)"
            )
        return chosen

    def _moments(self, timeline: FrameTimeline, max_frames: int) -> Iterator[Fraction]:
        """Moments that choose the frames; never more than are needed for `max_frames` of them."""
        for seconds in (self.start or 0, *(self.times or ())):
            if seconds > timeline.duration:
                end = float(timeline.time(len(timeline.stamps) - 1))
                raise OptionError(f"{seconds:g} s is past the video's last frame at {end:.2f} s")
        if self.times is not None:
            yield from map(_exact, self.times)
            return
        low = timeline.shown_at(_exact(self.start or 0))
        high = (
            timeline.shown_at(_exact(self.end))
            if self.end is not None
            else len(timeline.stamps) - 1
        )
        first, last = timeline.time(low), timeline.time(high)
        count = self.frames or (MAX_AT_RATE if self.fps else UNIFORM)
        if self.fps is not None and int((last - first) * _exact(self.fps)) < count:
            moment, step = first, 1 / _exact(self.fps)
            while moment <= last and max_frames:
                yield moment
                max_frames -= 1
                shown = timeline.shown_at(moment)
                if shown == high:
                    break
                # the first step that shows another frame
                moment = first + -((first - timeline.time(shown + 1)) // step) * step
        elif high - low < count:  # fewer frames than that: all of them
            yield from (timeline.time(i) for i in range(low, min(high + 1, low + max_frames)))
        else:
            count = min(count, max_frames)
            yield from (first + (last - first) * i / max(count - 1, 1) for i in range(count))


@dataclass(frozen=True, slots=True)
class FrameTimeline:
    """The times of a video's frames: `stamps`, ascending, in `unit` seconds."""

    stamps: Sequence[int]
    unit: Fraction

    def time(self, index: int) -> Fraction:
        """Seconds at which frame `index` appears."""
        return (self.stamps[index] - self.stamps[0]) * self.unit

    def shown_at(self, moment: Fraction) -> int:
        """Index of the frame on screen at `moment` seconds."""
        return max(bisect_right(self.stamps, self.stamps[0] + moment / self.unit) - 1, 0)

    @property
    def duration(self) -> float:
        """Seconds up to the last frame and a frame's mean time more."""
        gaps = len(self.stamps) - 1
        return float(self.time(gaps) * (gaps + 1) / gaps) if gaps else 0.0


@dataclass(frozen=True, slots=True)
class Clip:
    """Sampled frames, their times from the first frame, and the video's duration, both in seconds.

    `frames` is empty where only the times were read.
    """

    frames: list[Image.Image]
    times: list[float]
    duration: float

    def sentence(self) -> str:
        """The sentence of this family's training code about frame times.

        Source: LLaVA-NeXT `llava/train/train.py`, add_time_instruction.
        """
        times = ",".join(f"{t:.2f}s" for t in self.times)
        return (
            f"The video lasts for {self.duration:.2f} seconds, and {len(self.times)} frames are "
            f"uniformly sampled from it. These frames are located at {times}."
            "Please answer the following questions related to this video."
        )


def read_video(
    file: BinaryIO, container: str, sampling: FrameSampling, limits: Limits, each: Each | None
) -> Clip:
    """Sample a video in FFmpeg's `container` format; without `each` nothing is decoded.

    The time stamps of all packets are read first: they give the frames, also of variable rate and
    without a duration in the header, and the keyframes. Then the decoder jumps to the last keyframe
    before a frame of the sample, or goes on where that is nearer. Packets that an edit list
    discards are decoded but are not frames. Raises MediaError for a video that is broken, cut short
    or over a limit.
    """
    import av

    deadline = _deadline(limits)
    file, fragmented = _whole(file, container, limits, deadline)
    turn = ExitStack()
    try:
        with _opened(file, container) as (source, stream):
            width, height = stream.codec_context.width, stream.codec_context.height
            limits.check_size(width, height)
            index = _index(source, stream, container, fragmented, limits, deadline)
            timeline = index.timeline
            if timeline.duration > limits.video_seconds:
                raise MediaError(
                    f"the video lasts {timeline.duration:.0f} s, the limit is "
                    f"{limits.video_seconds:g} s (Limits.video_seconds)"
                )
            chosen = sampling.choose(timeline, limits.video_frames)
            if each is None:
                return Clip([], [float(timeline.time(i)) for i in chosen], timeline.duration)
            if width * height > LARGE:
                turn.enter_context(_large_video)
                deadline = _deadline(limits)  # the wait does not count
            stamps = [timeline.stamps[i] for i in chosen]
            if not index.unstamped:
                return _clip(source, stream, stamps, index, limits, deadline, each)
        with _opened(file, container) as (source, stream):  # no seek leads to unstamped packets
            return _clip(source, stream, stamps, index, limits, deadline, each)
    except av.error.FFmpegError as error:
        raise MediaError(
            "the video cannot be decoded: it is damaged, cut short or of an unknown codec"
        ) from error
    finally:
        turn.close()


def _deadline(limits: Limits) -> Deadline:
    return Deadline(limits.video_work_seconds, "reading the video", "video_work_seconds")


@contextmanager
def _opened(file: BinaryIO, container: str) -> Iterator[tuple[Any, Any]]:
    """A container at its beginning, and its main track."""
    import av

    file.seek(0)
    # The format is forced and no protocol allowed: a video cannot make FFmpeg open other files or
    # addresses.
    options = {"protocol_whitelist": "none"}
    with av.open(
        file, mode="r", format=container, options=options, metadata_errors="replace"
    ) as source:
        stream = _main_stream(source)
        stream.thread_type = "AUTO"
        yield source, stream


def _clip(
    source: Any,
    stream: Any,
    stamps: list[int],
    index: _Index,
    limits: Limits,
    deadline: Deadline,
    each: Each,
) -> Clip:
    """The frames with these stamps."""
    timeline = index.timeline
    clip = Clip([], [], timeline.duration)
    for stamp, frame in _decode(source, stream, stamps, index, limits, deadline):
        limits.check_size(frame.width, frame.height)
        clip.frames.append(each(upright(frame)))
        clip.times.append(float((stamp - timeline.stamps[0]) * timeline.unit))
    return clip


@dataclass(frozen=True, slots=True)
class _Index:
    """The timeline, and of each keyframe its stamp, ascending, and the position to seek to.

    unstamped: stamps of the first frames, where the container has none because they would be
        negative.
    """

    timeline: FrameTimeline
    keys: Sequence[int]
    positions: Sequence[int]
    unstamped: Sequence[int]


def _main_stream(source: Any) -> Any:
    """The video track that FFmpeg shows: the default one, then the largest; never a cover image.

    The stills of an image sequence (HEIF) are tracks of one frame for FFmpeg, and come last.
    """
    import av

    shown = av.stream.Disposition
    streams = [
        stream
        for stream in source.streams.video
        if stream.codec_context is not None and not stream.disposition & shown.attached_pic
    ]
    if not streams:
        raise MediaError("the file has no video track that can be decoded")
    return max(
        streams,
        key=lambda stream: (
            stream.frames != 1,
            bool(stream.disposition & shown.default),
            stream.codec_context.width * stream.codec_context.height,
        ),
    )


def _index(
    source: Any, stream: Any, container: str, fragmented: bool, limits: Limits, deadline: Deadline
) -> _Index:
    """The index of all packets; nothing is decoded."""
    import av

    stamps, keys, positions = array("q"), array("q"), array("q")
    packets = unstamped = 0
    try:
        for packet in source.demux(stream):
            deadline.left()
            if not packet.size:
                continue
            packets += 1
            if packets > limits.video_packets:
                raise MediaError(
                    f"the video has more than the limit of {limits.video_packets:,} packets "
                    "(Limits.video_packets)"
                )
            if packet.is_corrupt and container == "mov":
                if fragmented:
                    break
                raise MediaError("the video is cut short: its last frames are missing")
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is None:
                unstamped += not keys and (packets == 1 or unstamped) and not packet.is_discard
                continue
            if not packet.is_discard:
                stamps.append(stamp)
            if packet.is_keyframe and (not keys or stamp > keys[-1]):
                keys.append(stamp)
                # Containers are searched by decoding time, which may lie before the presentation.
                positions.append(stamp if packet.dts is None else min(stamp, packet.dts))
    except av.error.FFmpegError:
        if not (fragmented and stamps):
            raise
    before: list[int] = []
    if unstamped and stamps:
        first = sorted({*stamps[:MAX_REORDER]})
        step = min((b - a for a, b in pairwise(first)), default=1)
        before = [first[0] - step * k for k in range(unstamped, 0, -1)]
        stamps.extend(before)
        keys, positions = array("q", before[:1]), array("q", [BEGINNING])
    # Packets before the first keyframe cannot be decoded.
    shown = sorted({stamp for stamp in stamps if keys and stamp >= keys[0]})
    if not shown:
        raise MediaError("the video has no frame that can be shown")
    return _Index(FrameTimeline(shown, stream.time_base), keys, positions, before)


def _decode(
    source: Any,
    stream: Any,
    stamps: list[int],
    index: _Index,
    limits: Limits,
    deadline: Deadline,
) -> Iterator[tuple[int, Any]]:
    """The frames with these stamps, ascending.

    Where a container stamps half frames, the next whole frame is given.
    """
    decoded = 0

    def run(position: int) -> Iterator[tuple[int, Any]]:
        nonlocal decoded
        if position != BEGINNING:
            source.seek(position, stream=stream)
        decoder = _alpha_decoder(stream) or stream.codec_context
        unstamped = iter(index.unstamped if position == BEGINNING else ())
        for packet in _packets(source, stream):
            deadline.left()
            for frame in decoder.decode(packet):
                decoded += 1
                if decoded > limits.decoded_frames:
                    raise MediaError(
                        "reaching the frames meant decoding more than the limit of "
                        f"{limits.decoded_frames} frames (Limits.decoded_frames)"
                    )
                if frame.is_corrupt:
                    raise MediaError("the video is damaged: a frame could not be decoded whole")
                stamp = frame.pts if frame.pts is not None else frame.dts
                stamp = next(unstamped, None) if stamp is None else stamp
                if stamp is not None:
                    yield stamp, frame

    frames: Iterator[tuple[int, Any]] = iter(())
    at = -math.inf  # stamp of the frame decoded last
    for stamp in stamps:
        if at >= stamp:
            continue
        key = bisect_right(index.keys, stamp) - 1
        if jump := index.keys[key] > at:
            frames = run(index.positions[key])
        current = next((pair for pair in frames if pair[0] >= stamp), None)
        if jump and (current is None or current[0] > stamp):  # the container's seek went too far
            frames = run(index.positions[0])
            current = next((pair for pair in frames if pair[0] >= stamp), None)
        if current is None:
            break
        at = current[0]
        yield current
    if at == -math.inf:
        raise MediaError("the video has no frame that can be decoded")


def _packets(source: Any, stream: Any) -> Iterator[Any]:
    """The packets of a track from here on, up to one that is cut short, and None for the end."""
    for packet in source.demux(stream):
        if not packet.size or (packet.is_corrupt and "mov" in source.format.name):
            break
        yield packet
    yield None


def _alpha_decoder(stream: Any) -> Any:
    """A decoder that keeps the transparency of a VP8 or VP9 track; None where FFmpeg's own does."""
    import av

    name = ALPHA_DECODERS.get(stream.codec_context.codec.canonical_name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        return None
    try:
        decoder = av.CodecContext.create(name, "r")
    except ValueError:  # a build of FFmpeg without it
        return None
    decoder.extradata = stream.codec_context.extradata
    return decoder


def _whole(file: BinaryIO, container: str, limits: Limits, deadline: Deadline) -> tuple[Any, bool]:
    """The file at its start, and whether it is a fragmented MP4.

    Raises MediaError for a file that is shorter than its header says. A fragmented MP4 is written
    to be readable up to where it ends; of one that ends early the readable part is returned.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if container == "mov":
        return _check_boxes(file, size, limits, deadline)
    if size < (expected := _header_bytes(file.read(512))):
        raise MediaError(
            f"the video is cut short: its header promises {expected:,} bytes, the file holds "
            f"{size:,}"
        )
    file.seek(0)
    return file, False


def _check_boxes(file: BinaryIO, size: int, limits: Limits, deadline: Deadline) -> tuple[Any, bool]:
    """`_whole` of an MP4 or MOV, whose boxes at the top begin with their length."""
    at, samples, fragmented, boxes = 0, 0, False, 0
    while at + 8 <= size:
        deadline.left()
        boxes += 1
        if boxes > MAX_BOXES:
            raise MediaError(
                f"the video has more than the limit of {MAX_BOXES:,} boxes; remux it, for example "
                "by ffmpeg -c copy"
            )
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        fragmented |= kind == b"moof"
        if kind in (b"moov", b"moof"):
            file.seek(at)
            box = file.read(min(max(length, 0) or size, MAX_INDEX + 1))
            samples = _count_samples(box, samples, limits)
        if length < 8:  # 0: up to the end of the file
            break
        if at + length > size and fragmented:
            file.seek(0)
            return (file if kind == b"mdat" else _Beginning(file, at)), True
        if at + length > size and kind in (b"mdat", b"moov"):
            raise MediaError(
                f"the video is cut short: its {kind.decode()} box promises {at + length:,} bytes, "
                f"the file holds {size:,}"
            )
        at += length
    file.seek(0)
    return file, fragmented


def _count_samples(index: bytes, samples: int, limits: Limits) -> int:
    """`samples` and those of one more box. Raises MediaError for more than the limit.

    FFmpeg makes its list of all samples before a packet can be read, and a kilobyte can promise
    billions of them.
    """
    if len(index) > MAX_INDEX:
        raise MediaError(f"the index of the video has more than the limit of {MAX_INDEX:,} bytes")
    if b"cmov" in index:
        raise MediaError("the index of the video is compressed; convert it, for example by ffmpeg")
    for kind, offset in ((b"stsz", 12), (b"stz2", 12), (b"trun", 8)):
        at = index.find(kind)
        while at >= 0:
            samples += int.from_bytes(index[at + offset : at + offset + 4], "big")
            at = index.find(kind, at + 4)
    if samples > limits.video_packets:
        raise MediaError(
            f"the video has {samples:,} packets, more than the limit of {limits.video_packets:,}"
        )
    return samples


class _Beginning(io.RawIOBase):
    """The first `size` bytes of a file, for FFmpeg, which refuses one whose last box is cut."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            return self._file.seek(self._size + offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._file.tell(), 0)
        return self._file.read(left if size < 0 else min(size, left))


def _header_bytes(head: bytes) -> int:
    """The file size in the header of an AVI or Matroska file; 0 if unknown."""
    if head.startswith(b"RIFF"):
        return 8 + int.from_bytes(head[4:8], "little")
    # The Segment element; its size is a number of 1 to 8 bytes.
    at = head.find(b"\x18\x53\x80\x67", 0, 256) + 4
    if at < 4 or at >= len(head) or not head[at]:
        return 0
    length = 9 - head[at].bit_length()
    value = int.from_bytes(head[at : at + length], "big") ^ 1 << 7 * length
    # All ones: written live, size unknown.
    return 0 if value == (1 << 7 * length) - 1 else at + length + value


def upright(frame: Any) -> Image.Image:
    """A frame as RGB, transparency on white, turned and mirrored by its display matrix."""
    if frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components):
        rgba = Image.fromarray(frame.to_ndarray(format="rgba"))
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        image = frame.to_image()
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return image
    return _displayed(image, np.frombuffer(bytes(side_data), np.int32)[:9].tolist())


def _displayed(image: Image.Image, matrix: list[int]) -> Image.Image:
    """An image under a display matrix, by the rules of FFmpeg's automatic rotation.

    Source: FFmpeg `fftools/ffmpeg_filter.c`, configure_input_video_filter, and `cmdutils.c`,
    get_rotation.
    """
    transpose = Image.Transpose
    scale_x, scale_y = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not (scale_x and scale_y):
        return image
    angle = round(math.degrees(math.atan2(matrix[1] / scale_y, matrix[0] / scale_x))) % 360
    steps: list[Image.Transpose] = []
    if angle == 90:
        steps = [transpose.TRANSPOSE if matrix[3] > 0 else transpose.ROTATE_270]
    elif angle == 180:
        steps += [transpose.FLIP_LEFT_RIGHT] * (matrix[0] < 0)
        steps += [transpose.FLIP_TOP_BOTTOM] * (matrix[4] < 0)
    elif angle == 270:
        steps = [transpose.TRANSVERSE if matrix[3] < 0 else transpose.ROTATE_90]
    elif angle:
        return image.rotate(-angle, Image.Resampling.BILINEAR)
    else:
        steps += [transpose.FLIP_TOP_BOTTOM] * (matrix[4] < 0)
    for step in steps:
        image = image.transpose(step)
    return image


def _exact(seconds: float) -> Fraction:
    """0.3 as 3/10, not the float just below it."""
    return Fraction(seconds).limit_denominator(10**6)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
