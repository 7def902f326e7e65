"""Seconds to import, to load and to touch every page of the weights, and the peak memory of it all, each in a fresh process.

    python bench/load.py FOLDER [--dtype bfloat16] [--device cpu] [--repeat 3]

Prints one JSON line a run. Peak memory is VmHWM (all resident pages, the file's included) less what a fresh process with torch
has; Linux only.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

CHILD = """
import json, sys, time
def memory(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
start = time.perf_counter()
import llava_interleave
package = time.perf_counter() - start
start = time.perf_counter()
import torch
with_torch = time.perf_counter() - start
start = time.perf_counter()
from llava_interleave.checkpoints import load
weights = time.perf_counter() - start
torch.zeros(1) + 1
before = memory("VmHWM")
start = time.perf_counter()
model = load(sys.argv[1], dtype=getattr(torch, sys.argv[2]) if sys.argv[2] else None, device=sys.argv[3])
if sys.argv[3] != "cpu":
    torch.zeros(1, device=sys.argv[3]).item()
seconds = time.perf_counter() - start
start = time.perf_counter()
touched = sum(float(p.view(-1)[::256].sum()) for p in model.parameters())
touch = time.perf_counter() - start
held = sum(p.numel() * p.element_size() for p in model.parameters())
peak = memory("VmHWM")
print(json.dumps({
    "import_llava_interleave_s": round(package, 3), "import_torch_s": round(with_torch, 3), "import_weights_s": round(weights, 3),
    "load_s": round(seconds, 3), "first_touch_s": round(touch, 3), "weights_bytes": held,
    "peak_bytes": peak, "before_bytes": before,
    "peak_over_weights": round((peak - before) / held, 3),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: as stored"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    for _ in range(given.repeat):
        command = [sys.executable, "-c", CHILD, str(given.folder), given.dtype or "", given.device]
        line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        print(json.dumps(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
