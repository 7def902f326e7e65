"""Episodes as training samples in the M4-Instruct form, in memory or as files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from .draw import draw, write_video
from .episodes import SCENARIOS, Episode, episode
from .questions import DESCRIBE, Question, ask

VIDEO_FRAMES = 25  # the four that are looked at lie at every eighth


def placeholders(ep: Episode) -> str:
    """One `<image>` a line, after its name where views have names; a video is one."""
    if ep.scenario == "video":
        return "<image>"
    if ep.names:
        return "\n".join(f"{name}: <image>" for name in ep.names)
    return "\n".join(["<image>"] * len(ep.scenes))


def conversation(ep: Episode, rng: Random, *, questions: int, caption: float, held_out: bool = False) -> list[dict[str, str]]:
    """Turns {"from", "value"} about an episode: up to `questions` questions, and a description with probability `caption`."""
    asked = rng.sample(ep.questions, min(questions, len(ep.questions)))
    turns = [(ask(q, rng, held_out=held_out), q.answer) for q in asked]
    if not turns or rng.random() < caption:
        wording = re.sub(r"\[([^][]*)\]", lambda m: rng.choice(m[1].split("|")), rng.choice(DESCRIBE))
        turns.insert(0 if rng.random() < 0.6 else len(turns), (wording, ep.caption))
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    said[0]["value"] = f"{placeholders(ep)}\n{said[0]['value']}"
    return said


def pictures(ep: Episode, size: int) -> list[Image.Image]:
    return [Image.fromarray(draw(scene, size)) for scene in ep.scenes]


def exam(scenario: str, index: int, *, held_out: bool) -> tuple[Episode, Question, str]:
    """Question `index` of the world's benchmark in a scenario: episode, question, wording. Training never sees its seed."""
    rng = Random(f"exam/{scenario}/{index}")
    ep = episode(scenario, rng)
    question = rng.choice(ep.questions)
    return ep, question, ask(question, rng, held_out=held_out)


def write(folder: Path, count: int, *, size: int = 384, seed: int = 0) -> Path:
    """`count` samples, the scenarios in turn, as `annotations.json` in the M4-Instruct form, with the files it names."""
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
            for file, image in zip(files, pictures(ep, size), strict=True):
                image.save(folder / file)
            sample["image"] = files
        sample["conversations"] = conversation(ep, rng, questions=4, caption=0.5)
        sample["metadata"] = {"dataset": f"world-{scenario}", "question_type": "open-ended", "split": "train"}
        samples.append(sample)
    path = folder / "annotations.json"
    path.write_text(json.dumps(samples, indent=1))
    return path
