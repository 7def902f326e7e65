"""LLaVA-Interleave Bench (Li et al., LLaVA-NeXT-Interleave, 2024), from the folder that was
published with it.

Prompts, order and scores are those of LLaVA-NeXT, branch interleave_inference:
`llava/eval/model_vqa.py` and `evaluate_interleave.py`. Its slips that change numbers are repeated
only with `as_published`:
- of the full stops in a text only the first 32 are dropped;
- the question type of a data set is that of its first sample;
- in a sample of several turns the system prompt stands before every question.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError
from .scoring import interleave_choice, interleave_open
from .task import Example, Messages, Task, digest, read_json, require_file, with_images

FILES = {
    "interleave-in": "multi_image_in_domain.json",
    "interleave-out": "multi_image_out_domain.json",
    "interleave-views": "multi_view_in_domain.json",
}
FETCH = (
    "fetch the three JSON files and eval_images.zip of the data set "
    "lmms-lab/LLaVA-NeXT-Interleave-Bench on Hugging Face, "
    "put them there and unzip it, so that Split1 and Split2 are next to the JSON files"
)
CATEGORIES = {
    "spot_the_diff": ("Spot-the-Diff", "Birds-to-Words", "CLEVR-Change"),
    "image_edit_instruct": ("IEdit", "HQ-Edit", "MagicBrush"),
    "visual_story_telling": ("AESOP", "FlintstonesSV", "PororoSV", "VIST"),
    "visual_cloze": ("COMICS_Dialogue", "RecipeQA_VisualCloze"),
    "text_rich_vqa": ("WebQA", "TQA", "OCR-VQA", "DocVQA"),
    "multi_image_vqa": (
        "MIT-States_StateCoherence",
        "MIT-States_PropertyCoherence",
        "VISION",
        "RecipeQA_ImageCoherence",
    ),
    "puzzle": ("RAVEN",),
    "nlrv2": ("NLVR2_Mantis",),
    "qbench": ("QBench",),
}
"""Category -> data sets, in the published spelling and order."""
AVERAGE = tuple(name for name in CATEGORIES if name != "visual_cloze")
"""The eight columns of the paper's in-domain table."""

_IN = (
    "spot_the_diff", "image_edit_instruct", "visual_story_telling", "text_rich_vqa",
    "multi_image_vqa", "puzzle", "qbench",
    "nlrv2",
)  # fmt: skip
_OUT = ("MathVerse", "SciVerse", "Mantis", "BLINK")
_VIEWS = ("ScanNet_chat", "ScanNet_task", "ScanQA", "ALFRED", "nuscenes")
PAPER: dict[str, dict[str, dict[str, float]]] = {
    # Li et al., 2024, tables of the benchmark: its model in three sizes; 14B and GPT-4V also in
    # LLaVA-OneVision, table 4.
    "interleave-in": {
        "GPT-4V": dict(zip(_IN, (12.5, 11.0, 10.9, 54.5, 52.0, 17.1, 76.5, 88.8), strict=True)),
        "0.5B": dict(zip(_IN, (34.3, 21.6, 29.7, 63.9, 54.8, 35.4, 52.0, 67.8), strict=True)),
        "7B": dict(zip(_IN, (37.1, 24.3, 33.1, 76.1, 87.5, 48.7, 74.2, 88.8), strict=True)),
        "14B": dict(zip(_IN, (40.5, 24.5, 33.3, 78.6, 95.0, 59.9, 76.7, 91.1), strict=True)),
    },
    "interleave-out": {
        "GPT-4V": dict(zip(_OUT, (60.3, 66.9, 62.7, 51.1), strict=True)),
        "0.5B": dict(zip(_OUT, (13.3, 12.2, 45.6, 39.2), strict=True)),
        "7B": dict(zip(_OUT, (32.8, 31.6, 62.7, 52.6), strict=True)),
        "14B": dict(zip(_OUT, (33.4, 32.7, 66.4, 52.1), strict=True)),
    },
    "interleave-views": {
        "GPT-4V": dict(zip(_VIEWS, (31.2, 35.4, 32.6, 10.3, 63.7), strict=True)),
        "14B": dict(zip(_VIEWS, (70.6, 52.2, 34.5, 62.0, 76.7), strict=True)),
    },
}
PIPELINE = (
    "float16, images squashed to 384 x 384, preset official, greedy, at most 1024 new tokens, "
    "--as-published"
)


def load(
    name: str,
    root: Path,
    *,
    as_published: bool = False,
    system: str = "You are a helpful assistant.",
) -> Task:
    """One of the three files below `root/interleave` as a task. Broken samples are its faults, the
    rest its examples.
    """
    folder = root / "interleave"
    path = require_file(folder / FILES[name], FETCH)
    samples = read_json(path)
    if not isinstance(samples, list):
        raise DataError(f"{path} is not a list of samples; {FETCH}")
    examples: list[Example] = []
    faults: list[str] = []
    kinds: dict[str, str] = {}
    seen: dict[str, int] = {}
    for index, sample in enumerate(samples):
        if fault := check(sample, folder):
            where = (
                sample.get("sample_id", "without an id")
                if isinstance(sample, dict)
                else "that is not an object"
            )
            faults.append(f"sample {where} (number {index + 1}): {fault}")
            continue
        dataset, kind = sample["metadata"]["dataset"], sample["metadata"]["question_type"]
        if as_published:
            kind = kinds.setdefault(dataset, kind)
        number = f"{dataset}/{sample['sample_id']}"
        seen[number] = seen.get(number, 0) + 1
        number += f"#{seen[number]}" if seen[number] > 1 else ""
        scorer = interleave_open if kind == "open-ended" else interleave_choice
        for turn, (question, truth, content) in enumerate(turns(sample, folder)):
            messages: Messages = [{"role": "user", "content": content}]
            if as_published:
                messages.insert(0, {"role": "system", "content": system})
            examples.append(
                Example(
                    id=f"{number}/{turn + 1}",
                    follows=f"{number}/{turn}" if turn else "",
                    group=dataset,
                    kind=kind,
                    ask=lambda _, messages=messages: messages,  # type: ignore[misc]
                    question=question,
                    truth=truth,
                    scorer=partial(scorer, truth=truth, as_published=as_published),
                )
            )
    return Task(
        name=name,
        examples=examples,
        max_new_tokens=1024,
        preset="official",
        categories=CATEGORIES if name == "interleave-in" else {},
        average=AVERAGE if name == "interleave-in" else (),
        paper=PAPER[name],
        pipeline=PIPELINE,
        faults=faults,
        data=digest(path),
    )


def turns(sample: dict[str, Any], folder: Path) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Question, truth and content of every turn of a sample that `check` passed; images are taken
    in order.
    """
    images = [folder / name for name in sample["image"]]
    conversation = sample["conversations"]
    for human, gpt in zip(conversation[::2], conversation[1::2], strict=True):
        count = human["value"].count("<image>")
        yield human["value"], gpt["value"], with_images(human["value"], images[:count])
        images = images[count:]


def check(sample: Any, folder: Path) -> str:
    """The fault of a sample, or "". The header of every image is read."""
    try:
        conversation, images, metadata = (
            sample["conversations"],
            sample["image"],
            sample["metadata"],
        )
        values = [turn["value"] for turn in conversation]
        roles = [turn["from"] for turn in conversation]
        kind, dataset, _ = metadata["question_type"], metadata["dataset"], sample["sample_id"]
    except (KeyError, TypeError) as error:
        return (
            f"it lacks {error}"
            if isinstance(error, KeyError)
            else "a part of it is not in the benchmark's format"
        )
    if (
        not isinstance(dataset, str)
        or not isinstance(images, list)
        or not all(isinstance(p, str) for p in images)
    ):
        return "its image is not a list of file names, or its dataset not a name"
    if kind not in ("open-ended", "multi-choice"):
        return f"its question type is {kind!r}, not open-ended or multi-choice"
    if not all(isinstance(value, str) for value in values):
        return "the value of a turn is not text"
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        return (
            f"its turns are {', '.join(map(str, roles)) or 'none'} instead of human and gpt in "
            "pairs"
        )
    placeholders = sum(value.count("<image>") for value in values[::2])
    if placeholders != len(images):
        return f"its questions have {placeholders} <image>, but it has {len(images)} images"
    for name in images:
        try:
            with Image.open(folder / name):
                pass
        except FileNotFoundError:
            return f"{name} does not exist"
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return f"{name} is not a readable image ({type(error).__name__})"
    return ""
