"""`generate` of `llava_interleave.hf` and of transformers: seconds per greedy token, and RSS.

    python bench/make_checkpoint.py build/bench/0.5b --shape 0.5b
    python bench/hf_generate.py build/bench/0.5b --tokens 32 --rounds 3

Each system is a process of its own, so that its memory is its own; the systems take turns, and the
figure is the median of the rounds. The prompt has one image. The first token is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SYSTEMS = (
    "transformers float32",
    "transformers bfloat16",
    "llava float32",
    "llava bfloat16",
    "llava int8",
    "llava int4",
)


def load(system: str, folder: Path) -> tuple[Any, Any]:
    """The model of a system, and its processor."""
    import transformers

    from llava_interleave import hf

    package, precision = system.split()
    ours: Any = hf.LlavaForConditionalGeneration  # transformers' class, where it is installed
    processor = hf.AutoProcessor.from_pretrained(folder)
    if package == "transformers":
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=precision)
    elif precision in ("int4", "int8"):
        model = ours.from_pretrained(folder, precision=precision)
    else:
        model = ours.from_pretrained(folder, dtype=precision)
    return model.eval(), processor


def serve(system: str, folder: Path, tokens: int) -> None:
    """Answer each line of standard input with the seconds per token, and the peak RSS in GB."""
    import torch
    from PIL import Image

    model, processor = load(system, folder)
    image = Image.new("RGB", (384, 384), "red")
    text = "<|im_start|>user\n<image>What is this?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=text, images=[image], return_tensors="pt")
    if model.dtype != torch.float32:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=count, min_new_tokens=None, do_sample=False)
        return time.perf_counter() - start

    model.generation_config.eos_token_id = None
    seconds(2)
    print("ready", flush=True)
    for _ in sys.stdin:
        first, whole = seconds(1), seconds(tokens)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps([(whole - first) / (tokens - 1), first, rss]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS)
    parser.add_argument("--serve", help="the system that this process is")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.tokens)
        return
    found: dict[str, list[list[float]]] = {system: [] for system in options.systems}
    processes = {
        system: subprocess.Popen(
            [
                sys.executable,
                __file__,
                str(options.folder),
                f"--tokens={options.tokens}",
                f"--serve={system}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for system in options.systems
    }
    for process in processes.values():
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for _ in range(options.rounds):
        for system, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            found[system].append(json.loads(process.stdout.readline()))
    for system, process in processes.items():
        process.communicate("")
        token, first, rss = (
            statistics.median(column) for column in zip(*found[system], strict=True)
        )
        print(
            f"{system:24} {token * 1000:8.1f} ms a token {first:8.2f} s to the first {rss:6.2f} GB"
        )


if __name__ == "__main__":
    main()
