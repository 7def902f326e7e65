"""Benchmarks with one right answer of a few, read from the files that their authors publish; one reader each.

Questions are put in LLaVA's form for choices (docs/Evaluation.md of LLaVA): options as `A. ...` and a closing instruction.
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
from .scoring import letter
from .task import ContentPart, Example, Figures, Media, embedded, example, read_json, read_lines

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOOSE = "Answer with the option's letter from the given choices directly."
ONE_WORD = "Answer the question using a single word or phrase."


def choice(
    name: str,
    group: str,
    media: Media,
    question: str,
    options: Sequence[str],
    right: int,
    kind: str = "",
) -> Example:
    """A question with lettered options, one of them right."""
    listed = "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))
    return lettered(
        name, group, media, f"{question}\n{listed}\n{CHOOSE}", len(options), LETTERS[right], kind
    )


def lettered(
    name: str, group: str, media: Media, text: str, options: int, truth: str, kind: str = ""
) -> Example:
    """A question that has its options in its text already."""
    if truth not in LETTERS[:options]:
        raise ValueError(f"the answer of {name} is {truth!r}, but it has {options} options")
    return example(name, group, media, text, truth, partial(_letter, options, truth), kind)


def _letter(options: int, truth: str, said: str) -> float:
    return float(letter(said, options) == truth)


def _no(truth: str, said: str) -> float:
    """POPE's rule (LLaVA, llava/eval/eval_pope.py): an answer whose first sentence has no, No or not is no, any other is yes."""
    words = said.split(".")[0].replace(",", "").split(" ")
    return float(("no" if {"No", "not", "no"} & set(words) else "yes") == truth)


def nlvr2(folder: Path, path: Path) -> Iterator[Example]:
    """NLVR2 (Suhr et al., 2019): is a sentence true of two photographs?"""
    for row in read_lines(path):
        pair = row["identifier"].rpartition("-")[0]
        media = [
            {"type": "image", "path": str(folder / "images" / f"{pair}-img{i}.png")} for i in (0, 1)
        ]
        question = f"The first picture is the left one, the second the right one. {row['sentence']} Is this true or false?"
        right = ("true", "false").index(str(row["label"]).lower())
        yield choice(row["identifier"], "NLVR2", media, question, ("True", "False"), right)


def qbench(folder: Path, path: Path) -> Iterator[Example]:
    """Q-Bench, LLVisionQA (Wu et al., 2024): how good a picture is and what is wrong with it."""
    for number, row in enumerate(read_json(path)):
        media = [{"type": "image", "path": str(folder / "images" / row["img_path"])}]
        right = row["candidates"].index(row["correct_ans"])
        yield choice(str(number), "Q-Bench", media, row["question"], row["candidates"], right)


def nextqa(folder: Path, path: Path) -> Iterator[Example]:
    """NExT-QA, multiple choice (Xiao et al., 2021): why, how and when in a video. Kinds are the types of its files."""
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
    """POPE (Li et al., 2023): is a thing in the picture, or only likely to be?"""
    split = path.stem.removeprefix("coco_pope_")
    for row in read_lines(path):
        media = [{"type": "image", "path": str(folder / "val2014" / row["image"])}]
        if row["label"] not in ("yes", "no"):
            raise ValueError(f"a label is {row['label']!r}")
        text = f"{row['text']}\n{ONE_WORD}"
        yield example(
            f"{split}/{row['question_id']}",
            split,
            media,
            text,
            row["label"],
            partial(_no, row["label"]),
        )


def _outcome(row: dict[str, Any]) -> tuple[float, ...]:
    """Of a row of POPE: true and false positives, true and false negatives; positive is a yes."""
    right = row["score"] == 1
    said = (row["truth"] == "yes") == right
    return (
        float(said and right),
        float(said and not right),
        float(not said and right),
        float(not said and not right),
    )


POPE = Figures(
    _outcome,
    {
        "precision": lambda n: n[0] / (n[0] + n[1]),
        "recall": lambda n: n[0] / (n[0] + n[3]),
        "F1": lambda n: 2 * n[0] / (2 * n[0] + n[1] + n[3]),
        "share of yes": lambda n: (n[0] + n[1]) / n.sum(axis=0),
    },
)
"""What POPE reports beside the share that is right."""


def mvbench(folder: Path, path: Path) -> Iterator[Example]:
    """MVBench (Li et al., 2024): twenty ways to ask what happens in a video."""
    below = VIDEOS[path.stem]
    for number, row in enumerate(read_json(path)):
        place = folder / "video" / below / row["video"]
        video: ContentPart = {"type": "video", "path": str(place)}
        if path.stem == "episodic_reasoning":  # three frames a second, from 00001.jpg on
            video = {
                "type": "video",
                "video": [str(f) for f in _between(place, row["start"], row["end"])],
            }
        elif path.stem in BOUND:
            video |= {"start": row["start"], "end": row["end"]}
        right = row["candidates"].index(row["answer"])
        yield choice(
            f"{path.stem}/{number}", path.stem, [video], row["question"], row["candidates"], right
        )


def _between(folder: Path, start: float, end: float) -> list[Path]:
    frames = sorted(folder.glob("*.jpg"))
    return frames[max(1, round(start * 3)) - 1 : round(end * 3)] or frames or [folder / "00001.jpg"]


VIDEOS = {
    "action_sequence": "star/Charades_v1_480", "action_prediction": "star/Charades_v1_480", "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos", "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation", "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos", "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video", "scene_transition": "scene_qa/video", "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation", "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos", "fine_grained_pose": "nturgbd", "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}  # fmt: skip
"""MVBench: where the videos of each of its files lie, as its authors' reader has it."""
BOUND = ("action_sequence", "action_prediction", "object_interaction", "action_localization")
"""MVBench: the files whose questions are about a part of the video."""


def raven(_: Path, path: Path) -> Iterator[Example]:
    """RAVEN (Zhang et al., 2019): which panel completes the matrix? Groups are its seven configurations.

    A file is `CONFIGURATION/RAVEN_NUMBER_test.npz` with `image` [16, 160, 160], eight panels of the matrix and eight to choose
    from, and `target` (RAVEN, src/model/utility/dataset_utility.py). The wording is ours.
    """
    with np.load(path) as file:  # without pickle: the other arrays of the file are never opened
        target = int(file["target"])

    def panels(to: Path) -> list[ContentPart]:
        with np.load(path) as file:
            drawn = file["image"].reshape(16, 160, 160).astype(np.uint8)
        names = [to / f"{path.parent.name}-{path.stem}-{i}.png" for i in range(16)]
        for name, panel in zip(names, drawn, strict=True):
            Image.fromarray(panel).save(name)
        return [{"type": "image", "path": str(name)} for name in names]

    question = (
        "Here is a Raven's Progressive Matrix of three rows and three columns, row by row, without its last panel: "
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
    """BLINK (Fu et al., 2024): what people see within a blink; groups are its fourteen tasks.

    Parquet of the data set BLINK-Benchmark/BLINK: idx, sub_task, prompt with its options as `(A) ...`, choices, answer `(A)`, and
    image_1 to image_4. The prompt is the authors'; the closing instruction is LLaVA's.
    """
    table = Parquet(path)
    pictures = [f"image_{i}" for i in range(1, 5)]
    for number, row in enumerate(table.rows(("idx", "sub_task", "prompt", "choices", "answer"))):
        text = f"{row['prompt']}\n{CHOOSE}"
        media = embedded(table, number, *pictures)
        yield lettered(
            row["idx"], row["sub_task"], media, text, len(row["choices"]), row["answer"].strip("()")
        )


def muirbench(_: Path, path: Path) -> Iterator[Example]:
    """MuirBench (Wang et al., 2024): twelve tasks over several pictures; kinds are the relations between the pictures.

    Parquet of the data set MUIRBENCH/MUIRBENCH: idx, task, image_relation, question and options with `<image>` where the pictures
    of image_list stand, answer (a letter).
    """
    table = Parquet(path)
    for number, row in enumerate(
        table.rows(("idx", "task", "image_relation", "question", "options", "answer"))
    ):
        right = LETTERS.index(row["answer"])
        media = embedded(table, number, "image_list")
        yield choice(
            row["idx"],
            row["task"],
            media,
            row["question"],
            row["options"],
            right,
            row["image_relation"],
        )


def ai2d(_: Path, path: Path) -> Iterator[Example]:
    """AI2D (Kembhavi et al., 2016), its test set: questions about diagrams of school books.

    Parquet of the data set lmms-lab/ai2d: question, options, answer (the number of the right option, as text), image.
    """
    table = Parquet(path)
    for number, row in enumerate(table.rows(("question", "options", "answer"))):
        media = embedded(table, number, "image")
        yield choice(
            f"{path.stem}/{number}",
            "AI2D",
            media,
            row["question"],
            row["options"],
            int(row["answer"]),
        )
