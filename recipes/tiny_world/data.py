"""Episodes as training samples in the M4-Instruct form, in memory or as files.

`python -m recipes.tiny_world.data FOLDER -n 100` writes samples: annotations.json and its files.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from .draw import draw, write_video
from .episodes import NORMAL, SCENARIOS, Episode, Level, episode
from .questions import DESCRIBE, Question, ask

VIDEO_FRAMES = 25  # of those that are looked at four lie at every eighth, nine at every third


def placeholders(ep: Episode) -> str:
    """One `<image>` a line, after its name where views have names; a video is one."""
    if ep.scenario == "video":
        return "<image>"
    if ep.names:
        return "\n".join(f"{name}: <image>" for name in ep.names)
    return "\n".join(["<image>"] * len(ep.scenes))


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer as texts. source: the question, None for a description."""

    question: str
    answer: str
    source: Question | None


def talk(ep: Episode, rng: Random, *, questions: int, caption: float) -> list[Turn]:
    """Up to `questions` questions about an episode; with probability `caption`, a description."""
    turns = [
        Turn(ask(q, rng), q.full_answer, q)
        for q in rng.sample(ep.questions, min(questions, len(ep.questions)))
    ]
    if not turns or rng.random() < caption:
        wording = re.sub(
            r"\[([^][]*)\]", lambda m: rng.choice(m[1].split("|")), rng.choice(DESCRIBE)
        )
        turns.insert(0 if rng.random() < 0.6 else len(turns), Turn(wording, ep.caption, None))
    return turns


def conversation(
    ep: Episode, turns: Sequence[Turn], *, behind: bool = False
) -> list[dict[str, str]]:
    """The turns in M4-Instruct form, with the images before the first question, or `behind` it."""
    messages = [
        {"from": who, "value": text}
        for t in turns
        for who, text in (("human", t.question), ("gpt", t.answer))
    ]
    first = (messages[0]["value"], placeholders(ep))
    messages[0]["value"] = "\n".join(first if behind else reversed(first))
    return messages


def render(ep: Episode, size: int) -> list[Image.Image]:
    return [Image.fromarray(draw(scene, size)) for scene in ep.scenes]


def exam(
    scenario: str, index: int, *, held_out: bool, level: Level = NORMAL
) -> tuple[Episode, Question, str]:
    """Question `index` of the benchmark in a scenario: episode, question, wording; its seed is held
    out of training."""
    rng = Random(f"exam 2/{scenario}/{index}")
    ep = episode(scenario, rng, level)
    question = rng.choice(ep.questions)
    return ep, question, ask(question, rng, held_out=held_out)


def write(folder: Path, count: int, *, size: int = 384, seed: int = 0) -> Path:
    """`count` samples, scenarios in turn: annotations.json in M4-Instruct form and its files."""
    folder.mkdir(parents=True, exist_ok=True)
    samples: list[dict[str, Any]] = []
    for index in range(count):
        scenario = SCENARIOS[index % len(SCENARIOS)]
        rng = Random(f"written/{seed}/{index}")
        ep = episode(scenario, rng)
        name = f"{scenario}-{index:05}"
        sample: dict[str, Any] = {"sample_id": name}
        if ep.clip is not None:
            frames = [draw(ep.clip(i / (VIDEO_FRAMES - 1)), size) for i in range(VIDEO_FRAMES)]
            write_video(frames, folder / f"{name}.mp4")
            sample["video"] = f"{name}.mp4"
        else:
            files = [f"{name}-{label}.png" for label in (ep.names or range(1, len(ep.scenes) + 1))]
            for file, image in zip(files, render(ep, size), strict=True):
                image.save(folder / file)
            sample["image"] = files
        sample["conversations"] = conversation(ep, talk(ep, rng, questions=4, caption=0.5))
        sample["metadata"] = {
            "dataset": f"world-{scenario}",
            "question_type": "open-ended",
            "split": "train",
        }
        samples.append(sample)
    path = folder / "annotations.json"
    path.write_text(json.dumps(samples, indent=1))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m recipes.tiny_world.data", description="Write samples of the tiny world."
    )
    parser.add_argument("folder", type=Path, help="of annotations.json and the files it names")
    parser.add_argument("-n", type=int, default=8, help="samples; the scenarios take turns")
    parser.add_argument("--size", type=int, default=384, help="pixels a side")
    parser.add_argument("--seed", type=int, default=0, help="other seeds draw other scenes")
    options = parser.parse_args()
    print(write(options.folder, options.n, size=options.size, seed=options.seed))
