"""Open-ended benchmarks with short answers, read from the files of their authors; one
reader each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..parquet import Parquet
from .multiple_choice import SHORT_INSTRUCTION
from .scoring import anls, exact_match, rouge_l, vqa_accuracy
from .task import AggregateMetrics, Example, embedded_images, example, read_json

SEPARATOR = " | "
"""Between the reference answers of a row."""
SCANQA_VIEWS = 16
"""Images of a room per question of ScanQA; the number in the paper is not known."""


def scanqa(folder: Path, path: Path) -> Iterator[Example]:
    """ScanQA (Azuma et al., 2022): questions about a room, here with views spread evenly over the
    scan.

    Its JSON: scene_id, question_id, question, answers (docs/dataset.md of ATR-DBI/ScanQA). The
    views are ScanNet's own scannet_frames_25k: SCENE/color/*.jpg. The score is the share of exact
    matches.
    """
    for row in read_json(path):
        views = sorted((folder / "scannet_frames_25k" / row["scene_id"] / "color").glob("*.jpg"))
        views = views or [folder / "scannet_frames_25k" / row["scene_id"] / "color" / "000000.jpg"]
        count = min(SCANQA_VIEWS, len(views))
        chosen = [views[i * len(views) // count] for i in range(count)]
        media = [{"type": "image", "path": str(view)} for view in chosen]
        text, truths = (
            f"{row['question']}\n{SHORT_INSTRUCTION}",
            [str(answer) for answer in row["answers"]],
        )
        yield example(
            row["question_id"],
            "ScanQA",
            media,
            text,
            SEPARATOR.join(truths),
            partial(exact_match, truths=truths),
        )


def _rouge(row: Mapping[str, Any]) -> tuple[float, float]:
    answer = " ".join(row["answer"].lower().split()).removesuffix(".")
    return (
        max(rouge_l(answer, truth.lower()) for truth in row["truth"].split(SEPARATOR))
        if answer
        else 0.0
    ), 1.0


SCANQA_METRICS = AggregateMetrics(_rouge, {"ROUGE-L": lambda n: n[0] / n[1]})
"""ROUGE-L F of the nearest reference, as LLaVA-Interleave Bench computes it (the package `rouge`),
not COCO's of ScanQA's table.
"""


def docvqa(_: Path, path: Path) -> Iterator[Example]:
    """DocVQA (Mathew et al., 2021), its validation set: questions about scanned pages, scored by
    ANLS.

    Parquet of the data set lmms-lab/DocVQA: questionId, question, answers, image.
    """
    table = Parquet(path)
    for number, row in enumerate(table.rows(("questionId", "question", "answers"))):
        media, text = (
            embedded_images(table, number, "image"),
            f"{row['question']}\n{SHORT_INSTRUCTION}",
        )
        yield example(
            str(row["questionId"]),
            "DocVQA",
            media,
            text,
            SEPARATOR.join(row["answers"]),
            partial(anls, truths=row["answers"]),
        )


def vqav2(folder: Path, path: Path) -> Iterator[Example]:
    """VQA v2 (Goyal et al., 2017), its validation set: ten human answers to each question; kinds
    are its answer types.

    Questions and annotations as on visualqa.org; images are COCO's, COCO_val2014_ and twelve
    digits.
    """
    annotations = {
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
        annotation = annotations[row["question_id"]]
        truths = [one["answer"] for one in annotation["answers"]]
        text, scorer = (
            f"{row['question']}\n{SHORT_INSTRUCTION}",
            partial(vqa_accuracy, truths=truths),
        )
        name, truth = str(row["question_id"]), SEPARATOR.join(dict.fromkeys(truths))
        kind = annotation["answer_type"]
        yield example(name, "VQA v2", media, text, truth, scorer, kind, references=truths)
