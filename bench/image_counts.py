"""Cost of the first token by the number of images: seconds, of these vision and prefill, prefilled
tokens per second, and peak memory of the process.

    python bench/make_checkpoint.py /tmp/0.5b --shape 0.5b
    python bench/image_counts.py /tmp/0.5b --images 1 2 8 16 32 [--instructions avx512_bf16]

Each number of images has a process of its own, which answers once about one other image before.
int4 weights and an int8 KV cache unless others are named. Linux only."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from video_memory import status

from llava_interleave import Answer, load
from llava_interleave.kernels import binding


def noise_image(seed: int) -> Image.Image:
    """640 x 480; no two are alike."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return small.resize((640, 480), Image.Resampling.BICUBIC)


def measure(folder: str, images: int, precision: str, kv_precision: str) -> dict[str, object]:
    bot = load(folder, device="cpu", precision=precision, kv_precision=kv_precision)

    def first_token(count: int, seed: int) -> tuple[float, Answer]:
        shown = [noise_image(seed + i) for i in range(count)]
        began = time.perf_counter()
        answer = bot.ask("What differs?", shown, max_new_tokens=1, preset="hf", ignore_eos=True)
        return time.perf_counter() - began, answer

    first_token(1, 1000)
    loaded = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    cpu, (took, answer) = time.process_time(), first_token(images, 0)
    prefill = answer.timings.prefill or 0
    return {
        "instructions": binding.supported_instructions()[0],
        "images": images,
        "prompt_tokens": answer.usage.prompt,
        "first_token_s": round(took, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "vision_s": round(answer.timings.vision, 2),
        "prefill_s": round(prefill, 2),
        "prefill_tokens_per_s": round(answer.usage.prompt / prefill),
        "loaded_mib": loaded >> 20,
        "peak_mib": status("VmHWM") >> 20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 8, 16, 32])
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--kv-precision", default="int8")
    parser.add_argument("--instructions", choices=list(binding.CAPABILITIES))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        if given.instructions:
            binding.supported_instructions = lambda: (given.instructions,)  # type: ignore[assignment]
        row = measure(given.folder, given.images[0], given.precision, given.kv_precision)
        print(json.dumps(row), flush=True)
        return
    for images in given.images:
        command = [sys.executable, __file__, given.folder, "--one", "--images", str(images)]
        command += ["--precision", given.precision, "--kv-precision", given.kv_precision]
        command += ["--instructions", given.instructions] if given.instructions else []
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
