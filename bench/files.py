"""Every file of a folder through the loader: pixels equal to a reference reader's, or one line.

Images are compared with Pillow (HEIC and HEIF by pillow-heif), videos with the `ffmpeg` command
where there is one. A file is read in a process of its own, which ends after `--seconds`.

    pip download --no-binary :all: --no-deps pillow==13.0.0
    tar xzf pillow-13.0.0.tar.gz
    python bench/files.py pillow-13.0.0/Tests/images
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import re
import shutil
import subprocess
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from llava_interleave.errors import LlavaError, MediaError
from llava_interleave.processing import FrameSampling, Limits, Loader
from llava_interleave.processing.formats import image_format, is_video, video_format

NOT_MEDIA = (".py", ".txt", ".md", ".rst", ".json", ".sh", ".pyi", ".c", ".h")
LIMITS = Limits(image_pixels=178_000_000, side_ratio=100_000)


def reference_image(path: Path) -> np.ndarray:
    """The image by Pillow: its first or primary frame, upright, on white, as RGB."""
    with Image.open(path) as file:
        file.load()
        image: Image.Image = file
        wide = image.mode.startswith("I") or image.mode == "F"
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # noqa: BLE001  damaged EXIF data
            image = image.copy()
        if wide:
            values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
            values = values - min(values.min(), 0)
            bits = max(int(values.max()).bit_length(), 8)
            largest = 1 if image.mode == "F" and values.max() <= 1 else 2**bits - 1
            gray = np.round(values * (255 / largest)).astype(np.uint8)
            return np.repeat(gray[..., None], 3, axis=2)
        if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return np.asarray(image.convert("RGB"))


def reference_video(path: Path) -> np.ndarray:
    """All frames by the ffmpeg command, `[frames, H, W, 3]`."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-map", "0:v:0", "-vsync", "passthrough"]
    header = subprocess.run(
        [*command, "-f", "framehash", "-"], capture_output=True, text=True, check=False
    ).stdout
    size = re.search(r"#dimensions 0: (\d+)x(\d+)", header)
    if size is None:
        return np.zeros((0, 0, 0, 3), np.uint8)
    raw = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=False
    ).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, int(size[2]), int(size[1]), 3)


def compare(path: Path) -> str:
    """equal, differs ..., or refused: ... ."""
    loader = Loader(LIMITS)
    with path.open("rb") as file:
        head = file.read(512)
        video = video_format(head) is not None
        file.seek(0)
        animation = not video and is_video(file)
    try:
        if video:
            frames = [np.asarray(f) for f in loader.video(path, FrameSampling(frames=256)).frames]
        else:
            pixels = np.asarray(loader.image(path))
            if animation:
                loader.video(path, FrameSampling(frames=4))
    except LlavaError as error:
        line = str(error).removeprefix(f"{path}: ")
        return "refused: " + (line if "\n" not in line else "in several lines")
    if not video:
        expected = reference_image(path)
        if pixels.shape != expected.shape:
            return f"differs: {pixels.shape} instead of {expected.shape}"
        worst = int(np.abs(pixels.astype(int) - expected).max(initial=0))
        return "equal" if worst == 0 else f"differs by up to {worst}"
    if shutil.which("ffmpeg") is None:
        return "read (no ffmpeg to compare with)"
    shown = reference_video(path)
    if len(frames) == 256:
        shown = shown[:0]
    if len(frames) != len(shown) or frames[0].shape != shown[0].shape:
        return f"differs: {len(frames)} frames, ffmpeg {len(shown)}"
    worst = max(np.abs(a.astype(int) - b).mean() for a, b in zip(frames, shown, strict=True))
    return "equal" if worst < 2 else f"differs by {worst:.1f} on average"


def _work(path: Path, results: multiprocessing.Queue[str]) -> None:
    warnings.simplefilter("ignore")
    try:
        results.put(compare(path))
    except MediaError as error:
        results.put(f"refused: {error}")
    except Exception as error:  # noqa: BLE001  the finding
        results.put(f"CRASH {type(error).__name__}: {error}"[:200])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="Time for one file.")
    parser.add_argument("--all", action="store_true", help="Also print the files that are refused.")
    given = parser.parse_args()
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        print("without pillow-heif: HEIC and HEIF are refused")
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    begin = time.monotonic()
    context = multiprocessing.get_context("fork")
    files = [p for folder in given.folders for p in sorted(folder.rglob("*")) if p.is_file()]
    for path in files:
        if path.suffix.lower() in NOT_MEDIA:
            continue
        results = context.Queue()
        process = context.Process(target=_work, args=(path, results), daemon=True)
        process.start()
        try:
            result = results.get(timeout=given.seconds)
        except queue.Empty:
            result = "HANG or abort"
        process.kill()
        process.join()
        kind = result.split(":")[0].split(" by")[0].split(" ")[0]
        counts[kind] += 1
        if kind == "refused":
            reasons[re.sub(r"[\d,]+", "N", result[9:])[:90]] += 1
        if kind != "equal" and (given.all or kind != "refused"):
            with path.open("rb") as file:
                name = image_format(file.read(512))
            print(f"{path.name}  [{name or path.suffix}]  {result}", flush=True)
    print(f"\n{sum(counts.values())} files in {time.monotonic() - begin:.0f} s: {dict(counts)}")
    for reason, count in reasons.most_common():
        print(f"{count:5}  {reason}")


if __name__ == "__main__":
    main()
