"""Peak memory of questions about a long video, above that of the loaded model, and seconds of its
parts: reading (decoding and preparing frames), the tower, the prompt.

    python bench/make_checkpoint.py /tmp/onevision --shape onevision-0.5b [--layers 2]
    python bench/video_memory.py /tmp/onevision --frames 64 128 160 [--kv-precision int8]

The video is an MP4 of 640 x 360 that is made first; a process of its own answers about each number
of frames. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 640, 360


def write_video(path: Path, frames: int, offset: int = 0) -> None:
    """A moving gradient, a frame a second. offset: another video."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height = WIDTH, HEIGHT
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        for number in range(frames):
            values = np.stack([x + 7 * number, y + 3 * number, x + y + 50 * offset], -1) % 256
            frame = av.VideoFrame.from_ndarray(values.astype(np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def measure(folder: str, video: str, frames: int, kv_precision: str) -> dict[str, float]:
    """Bytes of the loaded model, and the peak of one answer above it."""
    from llava_interleave import load
    from llava_interleave.processing import Limits

    bot = load(folder, device="cpu", kv_precision=kv_precision, limits=Limits(video_frames=frames))
    bot.ask("Hello", max_new_tokens=1)
    loaded = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "video", "path": video, "frames": frames},
                {"type": "text", "text": "What happens?"},
            ],
        }
    ]
    began = time.perf_counter()
    bot.prompt(messages)
    read = time.perf_counter() - began
    answer = bot.chat(messages, max_new_tokens=2)
    return {
        "frames": frames,
        "tokens": answer.usage.prompt,
        "loaded_mib": loaded >> 20,
        "peak_above_mib": status("VmHWM") - loaded >> 20,
        "kv_mib": answer.usage.prompt * bot.engine.bytes_per_token >> 20,
        "read_s": round(read, 1),
        "vision_s": round(answer.timings.vision, 1),
        "prefill_s": round(answer.timings.prefill or 0, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 160])
    parser.add_argument("--kv-precision", default="auto")
    parser.add_argument("--video", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.video:
        print(json.dumps(measure(given.folder, given.video, given.frames[0], given.kv_precision)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        video = Path(scratch) / "video.mp4"
        write_video(video, max(given.frames))
        for frames in given.frames:
            command = [sys.executable, __file__, given.folder, "--frames", str(frames)]
            command += ["--kv-precision", given.kv_precision, "--video", str(video)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
