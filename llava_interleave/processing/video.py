"""Frames of a film at the times asked for, by keyframe seeks. Reads from an open binary file; knows no sources or models."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

from PIL import Image

from ..errors import MediaError, OptionError
from .limits import Deadline, Limits

UNIFORM, MOST_AT_RATE = 16, 32
Each = Callable[[Image.Image], Image.Image]
"""Applied to a frame as soon as it is decoded, so that large frames need not be kept."""


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """Which frames of a video are looked at. A moment stands for the frame on screen at it; no frame is taken twice.

    frames: how many, spread evenly in time from the first to the last frame (default: the checkpoint's number, else 16);
        with `fps`, the most (default 32).
    fps: so many a second from the first frame on; if that is more than `frames`, `frames` spread evenly instead.
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

    def choose(self, clock: FrameTimeline, limit: int) -> list[int]:
        """Indices, ascending, of the frames to look at. Raises OptionError for moments outside the video, or over `limit`."""
        chosen = sorted({clock.shown_at(moment) for moment in self._moments(clock, limit + 1)})
        if len(chosen) > limit:
            raise OptionError(
                f"more frames were asked of a video than the limit of {limit}; ask for fewer"
            )
        return chosen

    def _moments(self, clock: FrameTimeline, most: int) -> Iterator[Fraction]:
        """Moments that name the frames; never more than are needed to name `most` of them, whatever is asked for."""
        for asked in (self.start or 0, *(self.times or ())):
            if asked > clock.duration:
                end = float(clock.time(len(clock.stamps) - 1))
                raise OptionError(
                    f"{asked:g} s was asked for, but the video's last frame is at {end:.2f} s"
                )
        if self.times is not None:
            yield from map(_exact, self.times)
            return
        low = clock.shown_at(_exact(self.start or 0))
        high = clock.shown_at(_exact(self.end)) if self.end is not None else len(clock.stamps) - 1
        first, last = clock.time(low), clock.time(high)
        count = self.frames or (MOST_AT_RATE if self.fps else UNIFORM)
        if self.fps is not None and int((last - first) * _exact(self.fps)) < count:
            moment, step = first, 1 / _exact(self.fps)
            while moment <= last and most:
                yield moment
                most -= 1
                shown = clock.shown_at(moment)
                if shown == high:
                    break
                # the first step that shows another frame
                moment = first + -((first - clock.time(shown + 1)) // step) * step
        elif high - low < count:  # fewer frames than asked for: all of them
            yield from (clock.time(i) for i in range(low, min(high + 1, low + most)))
        else:
            count = min(count, most)
            yield from (first + (last - first) * i / max(count - 1, 1) for i in range(count))


@dataclass(frozen=True, slots=True)
class FrameTimeline:
    """When a video's frames appear: `stamps`, ascending, in `unit` seconds; times count from the first frame."""

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
    """Frames looked at, their times in seconds from the video's first frame, and how long the whole video lasts in seconds.

    `frames` is empty where only the times were asked for.
    """

    frames: list[Image.Image]
    times: list[float]
    duration: float

    def sentence(self) -> str:
        """What the training code of this family says about frame times, in its words.

        Source: LLaVA-NeXT `llava/train/train.py`, add_time_instruction.
        """
        times = ",".join(f"{t:.2f}s" for t in self.times)
        return (
            f"The video lasts for {self.duration:.2f} seconds, and {len(self.times)} frames are uniformly sampled from it. "
            f"These frames are located at {times}.Please answer the following questions related to this video."
        )


def read_video(
    file: BinaryIO, container: str, sampling: FrameSampling, limits: Limits, each: Each | None
) -> Clip:
    """Sample a film in FFmpeg's `container` format; without `each` nothing is decoded.

    The time stamps of all packets are read first: they tell the frames, also of variable rate and without a duration in
    the header, and where the keyframes are. Then the decoder jumps to the last keyframe before a wanted frame, or simply goes
    on where that is nearer. Raises MediaError for a film that is broken, cut short or over a limit.
    """
    import av

    head = file.read(512)
    if (size := file.seek(0, os.SEEK_END)) < (promised := _promised_bytes(head)):
        raise MediaError(
            f"the video is cut short: its header promises {promised:,} bytes, the file holds {size:,}"
        )
    file.seek(0)
    deadline = Deadline(limits.video_work_seconds, "reading the video")
    try:
        # The format is forced and no protocol allowed: a film cannot make FFmpeg open other files or addresses.
        options = {"protocol_whitelist": "none"}
        with av.open(file, format=container, options=options, metadata_errors="replace") as source:
            if not source.streams.video or source.streams.video[0].codec_context is None:
                raise MediaError("the file has no video track that can be decoded")
            stream = source.streams.video[0]
            stream.thread_type = "AUTO"
            limits.check_size(stream.codec_context.width, stream.codec_context.height)
            clock, keys = _index(source, stream, deadline)
            if clock.duration > limits.video_seconds:
                raise MediaError(
                    f"the video lasts {clock.duration:.0f} s, the limit is {limits.video_seconds:g} s"
                )
            chosen = sampling.choose(clock, limits.video_frames)
            if each is None:
                return Clip([], [float(clock.time(i)) for i in chosen], clock.duration)
            clip = Clip([], [], clock.duration)
            for stamp, frame in _decode(
                source, stream, [clock.stamps[i] for i in chosen], keys, limits, deadline
            ):
                limits.check_size(frame.width, frame.height)
                clip.frames.append(each(_upright(frame)))
                clip.times.append(float((stamp - clock.stamps[0]) * clock.unit))
    except av.error.FFmpegError as error:
        raise MediaError(
            "the video cannot be decoded: it is damaged, cut short or of an unknown codec"
        ) from error
    return clip


def _index(source: Any, stream: Any, deadline: Deadline) -> tuple[FrameTimeline, dict[int, int]]:
    """When the frames appear, and for each keyframe's stamp where to seek for it, ascending; nothing is decoded."""
    stamps: set[int] = set()
    keys: dict[int, int] = {}
    packets = 0
    for packet in source.demux(stream):
        deadline.left()
        packets += packet.size > 0
        stamp = packet.pts if packet.pts is not None else packet.dts
        if packet.size and stamp is not None and not packet.is_discard:
            stamps.add(stamp)
            if packet.is_keyframe:
                # Containers are searched by decoding time, which may lie before the time of showing.
                keys[stamp] = stamp if packet.dts is None else min(stamp, packet.dts)
    if packets < stream.frames and "mov" in source.format.name:
        raise MediaError(
            f"the video is cut short: its header promises {stream.frames} frames, the file holds {packets}"
        )
    if not keys:
        raise MediaError("the video has no frame that can be shown")
    # What comes before the first keyframe cannot be decoded.
    return FrameTimeline(sorted(s for s in stamps if s >= min(keys)), stream.time_base), dict(
        sorted(keys.items())
    )


def _decode(
    source: Any,
    stream: Any,
    wanted: list[int],
    keys: dict[int, int],
    limits: Limits,
    deadline: Deadline,
) -> Iterator[tuple[int, Any]]:
    """The wanted frames with their stamps, ascending. Where a container stamps half frames, the next whole frame is given."""
    decoded = 0

    def run(key: int) -> Iterator[tuple[int, Any]]:
        nonlocal decoded
        source.seek(keys[key], stream=stream)
        for frame in source.decode(stream):
            deadline.left()
            decoded += 1
            if decoded > limits.decoded_frames:
                raise MediaError(
                    f"reaching the frames meant decoding more than the limit of {limits.decoded_frames} frames"
                )
            if frame.is_corrupt:
                raise MediaError("the video is damaged: a frame could not be decoded whole")
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is not None:
                yield stamp, frame

    frames: Iterator[tuple[int, Any]] = iter(())
    starts = list(keys)
    at = -math.inf  # stamp of the frame decoded last
    for stamp in wanted:
        if at >= stamp:
            continue
        key = starts[bisect_right(starts, stamp) - 1]
        if jump := key > at:
            frames = run(key)
        current = next((pair for pair in frames if pair[0] >= stamp), None)
        if jump and (current is None or current[0] > stamp):  # the container's seek went too far
            frames = run(starts[0])
            current = next((pair for pair in frames if pair[0] >= stamp), None)
        if current is None:
            break
        at = current[0]
        yield current
    if at == -math.inf:
        raise MediaError("the video has no frame that can be decoded")


def _promised_bytes(head: bytes) -> int:
    """How many bytes the header of an AVI or Matroska file says it has; 0 where it does not say. (MP4 counts its frames.)"""
    if head.startswith(b"RIFF"):
        return 8 + int.from_bytes(head[4:8], "little")
    at = (
        head.find(b"\x18\x53\x80\x67", 0, 256) + 4
    )  # the Segment element; its size is a number of 1 to 8 bytes
    if at < 4 or at >= len(head) or not head[at]:
        return 0
    length = 9 - head[at].bit_length()
    value = int.from_bytes(head[at : at + length], "big") ^ 1 << 7 * length
    return (
        0 if value == (1 << 7 * length) - 1 else at + length + value
    )  # all ones: written live, size unknown


def _upright(frame: Any) -> Image.Image:
    """A frame as RGB, turned as its display matrix says (counter-clockwise, in degrees)."""
    image: Image.Image = frame.to_image()
    turns = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }
    turn = turns.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)


def _exact(seconds: float) -> Fraction:
    """0.3 as 3/10: the moment that was meant, not the float just below it."""
    return Fraction(seconds).limit_denominator(10**6)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
