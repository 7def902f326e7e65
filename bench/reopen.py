"""Seconds until a conversation that is opened again answers with a first token, with and without its keys and values.

    python bench/reopen.py [FOLDER] [--images 20] [--precision auto] [--kv auto] [--repeat 5]

Both take turns in one process whose caches are emptied before each; the files are in the machine's page cache. A JSON line:
medians of seconds and of processor seconds, tokens, bytes of the file, seconds to write it, and whether all said the same.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from llava_interleave.chat import Chatbot, load


def asked(bot: Chatbot, file: Path, kv: bool) -> tuple[float, float, int, int]:
    """Seconds and processor seconds until the first token, how many of the prompt's were known, and the token."""
    bot.engine.clear()
    began, computed = time.perf_counter(), time.process_time()
    answer = bot.resume(file, kv=kv).ask("And which of them is the last?", max_new_tokens=1)
    return (
        time.perf_counter() - began,
        time.process_time() - computed,
        answer.usage.cached,
        answer.tokens[0],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--kv", default="auto", choices=["auto", "int8"])
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    bot, random = (
        load(given.folder, precision=given.precision, kv_precision=given.kv),
        np.random.default_rng(0),
    )
    with tempfile.TemporaryDirectory() as folder:
        talk, file = bot.conversation(), Path(folder) / "talk.json"
        for number in range(given.images):
            picture = Path(folder) / f"{number}.png"
            Image.fromarray(random.integers(0, 255, (384, 384, 3), dtype=np.uint8)).save(picture)
            talk.attach(picture)
        tokens = talk.ask("What do you see?", max_new_tokens=16, ignore_eos=True).usage.prompt
        began = time.perf_counter()
        size = talk.save(file, kv=True)
        writing = time.perf_counter() - began
        runs = [{kv: asked(bot, file, kv) for kv in (True, False)} for _ in range(given.repeat)]
    took = {
        f"{unit}_{name}": round(statistics.median(run[kv][index] for run in runs), 4)
        for index, unit in enumerate(("seconds", "processor"))
        for kv, name in ((True, "with"), (False, "without"))
    }
    same = len({run[kv][3] for run in runs for kv in (True, False)}) == 1
    print(
        json.dumps(
            took
            | {
                "tokens": tokens,
                "known": runs[0][True][2],
                "bytes": size,
                "writing": round(writing, 3),
                "same": same,
            }
        )
    )


if __name__ == "__main__":
    main()
