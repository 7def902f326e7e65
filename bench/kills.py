"""Kill `llava batch` and `llava eval` with SIGKILL at random moments, start them again, compare with a run that was left alone.

    python bench/kills.py [--rounds 20] [--seed 0]

A round of a command is a fresh start, a kill, and a second start that goes on. Exit code 1 if a row was lost, doubled or changed.
Needs fork, so no Windows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

import llava_interleave.batch  # noqa: F401  once, here: every child has them then
from llava_interleave.cli import app
from llava_interleave.testing import tiny_checkpoint

SAMPLES = 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with TemporaryDirectory() as name:
        folder = Path(name)
        child(lambda: prepare(folder))
        for command, rows in (("batch", batch_rows), ("eval", eval_rows)):
            started = time.monotonic()
            child(lambda command=command: run(command, folder, folder / "whole"))
            seconds, wanted = time.monotonic() - started, rows(folder / "whole")
            assert len(wanted) == SAMPLES
            for number in range(given.rounds):
                out, moment = folder / f"{command}-{number}", chance.uniform(0, seconds)
                while not child(lambda command=command, out=out: run(command, folder, out), moment):
                    shutil.rmtree(out)  # it had ended before
                    moment /= 2
                child(lambda command=command, out=out: run(command, folder, out))
                if rows(out) != wanted:
                    print(
                        f"llava {command}, round {number + 1}: the rows differ from those of a run that was not killed"
                    )
                    return 1
                shutil.rmtree(out)
            print(
                f"llava {command}: killed and gone on {given.rounds} times; {SAMPLES} rows, none lost, doubled or changed"
            )
    return 0


def prepare(folder: Path) -> None:
    tiny_checkpoint(folder / "tiny")
    for i in range(5):
        Image.new("RGB", (40, 30), (50 * i, 90, 90)).save(folder / f"{i}.png")
    samples = [
        {"id": f"s{i}", "question": f"What of {i}?", "images": [f"{i % 5}.png"]}
        for i in range(SAMPLES)
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, samples)))


def run(command: str, folder: Path, out: Path) -> None:
    """A command as a person types it; `batch` is not started again when its output is there, which it refuses to overwrite."""
    out.mkdir(exist_ok=True)
    words: Sequence[object] = (
        "batch",
        folder / "in.jsonl",
        out / "out.jsonl",
        "--batch",
        3,
        "--max-new-tokens",
        4,
    )
    if command == "eval":
        words = (
            "eval",
            "recipes.tiny_world.benchmark:World",
            "--task-option",
            "scenario=single",
            "-n",
            SAMPLES,
            "--batch",
            3,
            "--max-new-tokens",
            4,
            "-o",
            out,
        )
    elif (out / "out.jsonl").exists():
        return
    with redirect_stdout(StringIO()):
        app([str(word) for word in (*words, "-m", folder / "tiny")], standalone_mode=False)


def batch_rows(out: Path) -> list[str]:
    assert not list(out.glob("*.part")), "a journal was left behind"
    return (out / "out.jsonl").read_text().splitlines()


def eval_rows(out: Path) -> list[str]:
    return sorted((out / "world.jsonl").read_text().splitlines()[1:])


def child(work: Callable[[], None], seconds: float | None = None) -> bool:
    """Do the work in a process of its own, which is killed after some seconds if any are given; whether it was."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            work()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001  the child must not return
            print(repr(error), flush=True)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    killed = os.WIFSIGNALED(status)
    if not killed and status:
        sys.exit("the command failed")
    return killed


if __name__ == "__main__":
    sys.exit(main())
