"""What fewer tokens a picture cost in answers, and what they save in time and memory.

    python bench/make_checkpoint.py build/bench/0.5b --shape 0.5b
    python bench/thin.py build/bench/0.5b [--precision int4] [--frames 8] [--rounds 5] [--questions 500]

A JSON line for each setting, which is of images and of video frames alike:

right        share of right answers of the built-in model in each scenario of its world
prompt       tokens of a question about a video, asked of the checkpoint
kv, features MiB of the prompt's keys and values, and of its features
vision       seconds in the tower
prefill      seconds from there to the first token
first        both; of all three medians over rounds, in which settings take turns
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llava_interleave import load
from llava_interleave.bench import noise
from llava_interleave.chat import Chatbot
from llava_interleave.evals.task import Messages
from recipes.tiny_world import benchmark
from recipes.tiny_world.episodes import FRAMES, SCENARIOS

SETTINGS = (
    (1, 1.0),
    (2, 1.0),
    (3, 1.0),
    (1, 0.9),
    (1, 0.75),
    (1, 0.5),
    (1, 0.25),
)  # sides of squares, shares that are kept


def answerer(bot: Chatbot, **thin: Any) -> Callable[[Sequence[Messages]], list[str]]:
    return lambda asked: [
        answer.text for answer in bot.batch(asked, max_new_tokens=benchmark.ROOM * FRAMES, **thin)
    ]


def options(pool: int, keep: float) -> dict[str, Any]:
    return {
        "image_token_pool": pool,
        "video_token_pool": pool,
        "image_token_ratio": keep,
        "video_token_ratio": keep,
    }


def film(bot: Chatbot, frames: int) -> Messages:
    """A question about frames that no cache has seen."""
    video = {
        "type": "video",
        "video": noise(frames, bot.model.config.vision.image_size),
        "frames": frames,
    }
    return [{"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}]


def measured(bot: Chatbot, asked: Messages, **thin: Any) -> dict[str, float]:
    answer = bot.chat(asked, max_new_tokens=1, ignore_eos=True, **thin)
    assert answer.timings.prefill is not None and answer.timings.first_token is not None
    return {
        "vision": answer.timings.vision,
        "prefill": answer.timings.prefill,
        "first": answer.timings.first_token,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=500)
    given = parser.parse_args()
    large, small = load(given.model, precision=given.precision), load()
    took: dict[tuple[int, float], list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
    for _ in range(given.rounds + 1):  # the first is not counted
        for setting, rows in took.items():
            rows.append(measured(large, film(large, given.frames), **options(*setting)))
    for (pool, keep), rows in took.items():
        thin = options(pool, keep)
        answer = answerer(small, **thin)
        right = {
            name: round(benchmark.evaluate(answer, name, given.questions, held_out=False).share, 3)
            for name in SCENARIOS
        }
        counted = large.estimate(film(large, given.frames), **thin)
        kv = counted.total * large.engine.bytes_per_token
        times = {
            name: round(statistics.median(row[name] for row in rows[1:]), 3) for name in rows[0]
        }
        sizes = {"kv": round(kv / 2**20, 1), "features": round(counted.feature_bytes / 2**20, 1)}
        print(
            json.dumps(
                {"pool": pool, "keep": keep, "right": right, "prompt": counted.total}
                | sizes
                | times
            ),
            flush=True,
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
