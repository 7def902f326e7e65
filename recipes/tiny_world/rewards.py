"""GRPO on the world's questions: a verifiable reward, and samples of one question each.

`python -m recipes.tiny_world.rewards FOLDER -n 400 --scenario multi` writes samples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from random import Random
from typing import Any

from .data import Turn, conversation, render
from .episodes import LEVELS, episode
from .questions import ask


def exact(_: str, answer: str, sample: Mapping[str, Any]) -> float:
    """1 for the sample's answer, 0 for another; reasons before the last colon do not count."""
    truth = sample["conversations"][-1]["value"]
    return float(_conclusion(answer) == _conclusion(truth))


def _conclusion(text: str) -> str:
    return text.rpartition(":")[2].strip().rstrip(".").lower()


def write(
    folder: Path, count: int, *, scenario: str, level: str, kinds: Collection[str], seed: int
) -> Path:
    """`count` samples with one question of the kinds (all without any), of images: grpo.json."""
    folder.mkdir(parents=True, exist_ok=True)
    samples: list[dict[str, Any]] = []
    number = 0
    while len(samples) < count:
        rng = Random(f"grpo/{seed}/{scenario}/{number}")
        number += 1
        ep = episode(scenario, rng, LEVELS[level])
        if not (asked := [q for q in ep.questions if not kinds or q.about in kinds]):
            continue
        question = rng.choice(asked)
        turns = [Turn(ask(question, rng), question.full_answer, question)]
        files = [f"{scenario}-{number}-{place}.png" for place in range(len(ep.scenes))]
        for file, image in zip(files, render(ep, 256), strict=True):
            image.save(folder / file)
        samples.append(
            {
                "id": f"{scenario}-{number}",
                "image": files,
                "conversations": conversation(ep, turns),
                "metadata": {"dataset": question.about},
            }
        )
    path = folder / "grpo.json"
    path.write_text(json.dumps(samples, indent=1))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny_world.rewards")
    parser.add_argument("folder", type=Path, help="of grpo.json and its images")
    parser.add_argument("-n", type=int, default=400, help="samples")
    parser.add_argument("--scenario", default="multi", choices=("single", "multi", "views"))
    parser.add_argument("--level", default="normal", choices=LEVELS)
    parser.add_argument("--kind", action="append", default=[], help="of questions; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="other seeds draw other scenes")
    o = parser.parse_args()
    print(write(o.folder, o.n, scenario=o.scenario, level=o.level, kinds=o.kind, seed=o.seed))
