"""Benchmarks whose answers are a few free words, read from the files that their authors publish; one reader each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..parquet import Parquet
from .multiple_choice import ONE_WORD
from .scoring import anls, exact, rouge_l, vqa_accuracy
from .task import Example, Figures, embedded, example, read_json

OR = " | "
"""Between the truths of a row."""
VIEWS = 16
"""Pictures of a room that ScanQA's questions are asked with; how many the paper took is not known."""


def scanqa(folder: Path, path: Path) -> Iterator[Example]:
    """ScanQA (Azuma et al., 2022): questions about a room, here with views of it, spread evenly over the scan.

    Its JSON: scene_id, question_id, question, answers (docs/dataset.md of ATR-DBI/ScanQA). The views are ScanNet's own
    scannet_frames_25k: SCENE/color/*.jpg. The score is the share of exact matches.
    """
    for row in read_json(path):
        views = sorted((folder / "scannet_frames_25k" / row["scene_id"] / "color").glob("*.jpg"))
        views = views or [folder / "scannet_frames_25k" / row["scene_id"] / "color" / "000000.jpg"]
        count = min(VIEWS, len(views))
        chosen = [views[i * len(views) // count] for i in range(count)]
        media = [{"type": "image", "path": str(view)} for view in chosen]
        text, truths = f"{row['question']}\n{ONE_WORD}", [str(answer) for answer in row["answers"]]
        yield example(
            row["question_id"],
            "ScanQA",
            media,
            text,
            OR.join(truths),
            partial(exact, truths=truths),
        )


def _rouge(row: Mapping[str, Any]) -> tuple[float, float]:
    said = " ".join(row["answer"].lower().split()).removesuffix(".")
    return (
        max(rouge_l(said, truth.lower()) for truth in row["truth"].split(OR)) if said else 0.0
    ), 1.0


SCANQA = Figures(_rouge, {"ROUGE-L": lambda n: n[0] / n[1]})
"""ROUGE-L F of the nearest answer, as LLaVA-Interleave Bench computes it (the package `rouge`), not COCO's of ScanQA's table."""


def docvqa(_: Path, path: Path) -> Iterator[Example]:
    """DocVQA (Mathew et al., 2021), its validation set: questions about scanned pages, scored by ANLS.

    Parquet of the data set lmms-lab/DocVQA: questionId, question, answers, image.
    """
    table = Parquet(path)
    for number, row in enumerate(table.rows(("questionId", "question", "answers"))):
        media, text = embedded(table, number, "image"), f"{row['question']}\n{ONE_WORD}"
        yield example(
            str(row["questionId"]),
            "DocVQA",
            media,
            text,
            OR.join(row["answers"]),
            partial(anls, truths=row["answers"]),
        )


def vqav2(folder: Path, path: Path) -> Iterator[Example]:
    """VQA v2 (Goyal et al., 2017), its validation set: ten people's answers to each question; kinds are its types of answers.

    The questions and annotations as visualqa.org has them; pictures are COCO's, COCO_val2014_ and twelve digits.
    """
    people = {
        row["question_id"]: row
        for row in read_json(folder / "v2_mscoco_val2014_annotations.json")["annotations"]
    }
    for row in read_json(path)["questions"]:
        media = [
            {
                "type": "image",
                "path": str(folder / "val2014" / f"COCO_val2014_{row['image_id']:012}.jpg"),
            }
        ]
        said = people[row["question_id"]]
        truths = [one["answer"] for one in said["answers"]]
        text, judge = f"{row['question']}\n{ONE_WORD}", partial(vqa_accuracy, truths=truths)
        name, truth = str(row["question_id"]), OR.join(dict.fromkeys(truths))
        yield example(name, "VQA v2", media, text, truth, judge, said["answer_type"])
