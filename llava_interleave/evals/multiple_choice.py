"""Multiple-choice benchmarks, read from the files of their authors; one reader each.

Prompts follow LLaVA (docs/Evaluation.md there): options as `A. ...` and a closing instruction.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..parquet import Parquet
from .letters import LETTERS, choice_letter
from .task import (
    AggregateMetrics,
    ContentPart,
    Example,
    Media,
    embedded_images,
    example,
    read_json,
    read_lines,
)

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
SHORT_INSTRUCTION = "Answer the question using a single word or phrase."


def choice(
    name: str,
    group: str,
    media: Media,
    question: str,
    options: Sequence[str],
    correct: int,
    kind: str = "",
) -> Example:
    """A question with lettered options, one of them correct."""
    listed = "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))
    return lettered(
        name,
        group,
        media,
        f"{question}\n{listed}\n{LETTER_INSTRUCTION}",
        options,
        LETTERS[correct],
        kind,
    )


def lettered(
    name: str,
    group: str,
    media: Media,
    text: str,
    options: Sequence[str],
    truth: str,
    kind: str = "",
) -> Example:
    """A question whose text has its options already."""
    if truth not in LETTERS[: len(options)]:
        raise ValueError(f"the answer of {name} is {truth!r}, but it has {len(options)} options")
    scorer = partial(_score_letter, len(options), truth)
    return example(name, group, media, text, truth, scorer, kind, options)


def _score_letter(options: int, truth: str, answer: str) -> float:
    return float(choice_letter(answer, options) == truth)


def _score_pope(truth: str, answer: str) -> float:
    """POPE's rule (LLaVA, llava/eval/eval_pope.py): "no" if its first sentence has no, No or not,
    else "yes".
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return float(("no" if {"No", "not", "no"} & set(words) else "yes") == truth)


def nlvr2(folder: Path, path: Path) -> Iterator[Example]:
    """NLVR2 (Suhr et al., 2019): is a sentence true of two photographs?"""
    for row in read_lines(path):
        pair = row["identifier"].rpartition("-")[0]
        media = [
            {"type": "image", "path": str(folder / "images" / f"{pair}-img{i}.png")} for i in (0, 1)
        ]
        question = (
            f"The first picture is the left one, the second the right one. {row['sentence']} Is "
            "this true or false?"
        )
        correct = ("true", "false").index(str(row["label"]).lower())
        yield choice(row["identifier"], "NLVR2", media, question, ("True", "False"), correct)


def qbench(folder: Path, path: Path) -> Iterator[Example]:
    """Q-Bench, LLVisionQA (Wu et al., 2024): the quality of an image and its defects."""
    for number, row in enumerate(read_json(path)):
        media = [{"type": "image", "path": str(folder / "images" / row["img_path"])}]
        correct = row["candidates"].index(row["correct_ans"])
        yield choice(str(number), "Q-Bench", media, row["question"], row["candidates"], correct)


def nextqa(folder: Path, path: Path) -> Iterator[Example]:
    """NExT-QA, multiple choice (Xiao et al., 2021): why, how and when in a video. Kinds are the
    types of its files.
    """
    videos = read_json(folder / "map_vid_vidorID.json")
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            media = [
                {"type": "video", "path": str(folder / "NExTVideo" / f"{videos[row['video']]}.mp4")}
            ]
            options = [row[f"a{i}"] for i in range(5)]
            name = f"{row['video']}/{row['qid']}"
            yield choice(
                name,
                "NExT-QA",
                media,
                f"{row['question']}?",
                options,
                int(row["answer"]),
                row["type"],
            )


def pope(folder: Path, path: Path) -> Iterator[Example]:
    """POPE (Li et al., 2023): is an object in the image, or only likely to be?"""
    split = path.stem.removeprefix("coco_pope_")
    for row in read_lines(path):
        media = [{"type": "image", "path": str(folder / "val2014" / row["image"])}]
        if row["label"] not in ("yes", "no"):
            raise ValueError(f"a label is {row['label']!r}")
        text = f"{row['text']}\n{SHORT_INSTRUCTION}"
        yield example(
            f"{split}/{row['question_id']}",
            split,
            media,
            text,
            row["label"],
            partial(_score_pope, row["label"]),
        )


def _confusion(row: dict[str, Any]) -> tuple[float, ...]:
    """True and false positives, true and false negatives of a row of POPE; yes is positive."""
    correct = row["score"] == 1
    yes = (row["truth"] == "yes") == correct
    return (
        float(yes and correct),
        float(yes and not correct),
        float(not yes and correct),
        float(not yes and not correct),
    )


POPE_METRICS = AggregateMetrics(
    _confusion,
    {
        "precision": lambda n: n[0] / (n[0] + n[1]),
        "recall": lambda n: n[0] / (n[0] + n[3]),
        "F1": lambda n: 2 * n[0] / (2 * n[0] + n[1] + n[3]),
        "share of yes": lambda n: (n[0] + n[1]) / n.sum(axis=0),
    },
)
"""The metrics of POPE besides accuracy."""


def mvbench(folder: Path, path: Path) -> Iterator[Example]:
    """MVBench (Li et al., 2024): twenty kinds of questions about a video."""
    below = VIDEOS[path.stem]
    for number, row in enumerate(read_json(path)):
        place = folder / "video" / below / row["video"]
        video: ContentPart = {"type": "video", "path": str(place)}
        if path.stem == "episodic_reasoning":  # three frames a second, from 00001.jpg on
            video = {
                "type": "video",
                "video": [str(f) for f in _frames_between(place, row["start"], row["end"])],
            }
        elif path.stem in TIMED:
            video |= {"start": row["start"], "end": row["end"]}
        correct = row["candidates"].index(row["answer"])
        yield choice(
            f"{path.stem}/{number}", path.stem, [video], row["question"], row["candidates"], correct
        )


def _frames_between(folder: Path, start: float, end: float) -> list[Path]:
    frames = sorted(folder.glob("*.jpg"))
    return frames[max(1, round(start * 3)) - 1 : round(end * 3)] or frames or [folder / "00001.jpg"]


VIDEOS = {
    "action_sequence": "star/Charades_v1_480", "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos", "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation", "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos", "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video", "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation", "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos", "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}  # fmt: skip
"""MVBench: the folder of each file's videos, as in its authors' reader."""
TIMED = ("action_sequence", "action_prediction", "object_interaction", "action_localization")
"""MVBench: the files whose questions are about a part of the video."""


def raven(_: Path, path: Path) -> Iterator[Example]:
    """RAVEN (Zhang et al., 2019): which panel completes the matrix? Groups are its seven
    configurations.

    A file is `CONFIGURATION/RAVEN_NUMBER_test.npz` with `image` [16, 160, 160], eight panels of the
    matrix and eight options, and `target` (RAVEN, src/model/utility/dataset_utility.py). The
    wording is this package's.
    """
    with np.load(path) as file:  # without pickle: its other arrays are never opened
        target = int(file["target"])

    def panels(to: Path) -> list[ContentPart]:
        with np.load(path) as file:
            drawn = file["image"].reshape(16, 160, 160).astype(np.uint8)
        names = [to / f"{path.parent.name}-{path.stem}-{i}.png" for i in range(16)]
        for name, panel in zip(names, drawn, strict=True):
            Image.fromarray(panel).save(name)
        return [{"type": "image", "path": str(name)} for name in names]

    question = (
        "Here is a Raven's Progressive Matrix of three rows and three columns, row by row, "
        "without its last panel: "
        f"{'<image>' * 8}\n"
        "Which of these completes it?"
    )
    yield choice(
        f"{path.parent.name}/{path.stem}",
        path.parent.name,
        panels,
        question,
        ["<image>"] * 8,
        target,
    )


def blink(_: Path, path: Path) -> Iterator[Example]:
    """BLINK (Fu et al., 2024): perception within a blink; groups are its fourteen tasks.

    Parquet of the data set BLINK-Benchmark/BLINK: idx, sub_task, prompt with its options as `(A)
    ...`, choices, answer `(A)`, and image_1 to image_4. The prompt is the authors'; the closing
    instruction is LLaVA's.
    """
    table = Parquet(path)
    columns = [f"image_{i}" for i in range(1, 5)]
    for number, row in enumerate(table.rows(("idx", "sub_task", "prompt", "choices", "answer"))):
        text = f"{row['prompt']}\n{LETTER_INSTRUCTION}"
        media = embedded_images(table, number, *columns)
        yield lettered(
            row["idx"], row["sub_task"], media, text, row["choices"], row["answer"].strip("()")
        )


def muirbench(_: Path, path: Path) -> Iterator[Example]:
    """MuirBench (Wang et al., 2024): twelve tasks over several images; kinds are the relations
    between the images.

    Parquet of the data set MUIRBENCH/MUIRBENCH: idx, task, image_relation, question and options
    with `<image>` where the images of image_list stand, answer (a letter).
    """
    table = Parquet(path)
    for number, row in enumerate(
        table.rows(("idx", "task", "image_relation", "question", "options", "answer"))
    ):
        correct = LETTERS.index(row["answer"])
        media = embedded_images(table, number, "image_list")
        yield choice(
            row["idx"],
            row["task"],
            media,
            row["question"],
            row["options"],
            correct,
            row["image_relation"],
        )


def ai2d(_: Path, path: Path) -> Iterator[Example]:
    """AI2D (Kembhavi et al., 2016), its test set: questions about textbook diagrams.

    Parquet of the data set lmms-lab/ai2d: question, options, answer (the index of the correct
    option, as text), image.
    """
    table = Parquet(path)
    for number, row in enumerate(table.rows(("question", "options", "answer"))):
        media = embedded_images(table, number, "image")
        yield choice(
            f"{path.stem}/{number}",
            "AI2D",
            media,
            row["question"],
            row["options"],
            int(row["answer"]),
        )
