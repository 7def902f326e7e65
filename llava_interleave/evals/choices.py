"""Benchmarks with one right answer of a few, read from the files that their authors publish; one reader each.

Questions are put in LLaVA's form for choices (docs/Evaluation.md of LLaVA): options as `A. ...` and a closing instruction.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError
from .scoring import Judge, letter
from .task import Example, Task, digest, find, read_json, read_lines

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOOSE = "Answer with the option's letter from the given choices directly."
ONE_WORD = "Answer the question using a single word or phrase."
Part = dict[str, Any]


def choice(
    name: str, group: str, media: Sequence[Part], question: str, options: Sequence[str], right: int, kind: str = ""
) -> Example:
    """A question with lettered options, one of them right."""
    listed = "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))
    truth = LETTERS[right]
    return _example(name, group, media, f"{question}\n{listed}\n{CHOOSE}", truth, partial(_letter, len(options), truth), kind)


def _letter(options: int, truth: str, said: str) -> float:
    return float(letter(said, options) == truth)


def _no(truth: str, said: str) -> float:
    """POPE's rule (LLaVA, llava/eval/eval_pope.py): an answer whose first sentence has no, No or not is no, any other is yes."""
    words = said.split(".")[0].replace(",", "").split(" ")
    return float(("no" if {"No", "not", "no"} & set(words) else "yes") == truth)


def _example(name: str, group: str, media: Sequence[Part], text: str, truth: str, judge: Judge, kind: str = "") -> Example:
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]
    return Example(id=name, group=group, kind=kind, ask=lambda _: messages, question=text, truth=truth, judge=judge)


def nlvr2(folder: Path, path: Path) -> Iterator[Example]:
    """NLVR2 (Suhr et al., 2019): is a sentence true of two photographs?"""
    for row in read_lines(path):
        pair = row["identifier"].rpartition("-")[0]
        media = [{"type": "image", "path": str(folder / "images" / f"{pair}-img{i}.png")} for i in (0, 1)]
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
    videos = read_json(find(folder / "map_vid_vidorID.json", FETCH["nextqa"]))
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            media = [{"type": "video", "path": str(folder / "NExTVideo" / f"{videos[row['video']]}.mp4")}]
            options = [row[f"a{i}"] for i in range(5)]
            name = f"{row['video']}/{row['qid']}"
            yield choice(name, "NExT-QA", media, f"{row['question']}?", options, int(row["answer"]), row["type"])


def pope(folder: Path, path: Path) -> Iterator[Example]:
    """POPE (Li et al., 2023): is a thing in the picture, or only likely to be?"""
    split = path.stem.removeprefix("coco_pope_")
    for row in read_lines(path):
        media = [{"type": "image", "path": str(folder / "val2014" / row["image"])}]
        if row["label"] not in ("yes", "no"):
            raise ValueError(f"a label is {row['label']!r}")
        text = f"{row['text']}\n{ONE_WORD}"
        yield _example(f"{split}/{row['question_id']}", split, media, text, row["label"], partial(_no, row["label"]))


def mvbench(folder: Path, path: Path) -> Iterator[Example]:
    """MVBench (Li et al., 2024): twenty ways to ask what happens in a video."""
    below = VIDEOS[path.stem]
    for number, row in enumerate(read_json(path)):
        place = folder / "video" / below / row["video"]
        video: Part = {"type": "video", "path": str(place)}
        if path.stem == "episodic_reasoning":  # three frames a second, from 00001.jpg on
            video = {"type": "video", "video": [str(f) for f in _between(place, row["start"], row["end"])]}
        elif path.stem in BOUND:
            video |= {"start": row["start"], "end": row["end"]}
        right = row["candidates"].index(row["answer"])
        yield choice(f"{path.stem}/{number}", path.stem, [video], row["question"], row["candidates"], right)


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

Reader = Callable[[Path, Path], Iterator[Example]]
READERS: Mapping[str, tuple[Reader, tuple[str, ...]]] = {
    "nlvr2": (nlvr2, ("test1.json",)),
    "qbench": (qbench, ("llvisionqa_dev.json",)),
    "nextqa": (nextqa, ("test.csv",)),
    "pope": (pope, ("coco_pope_random.json", "coco_pope_popular.json", "coco_pope_adversarial.json")),
    "mvbench": (mvbench, tuple(f"json/{name}.json" for name in VIDEOS)),
}
"""Task -> reader and files, all below a folder of the task's name."""
FETCH = {
    "nlvr2": "fetch nlvr2/data/test1.json of github.com/lil-lab/nlvr, and its pictures (see its README) into images/ beside it",
    "qbench": "fetch llvisionqa_dev.json of Q-Bench (github.com/Q-Future/Q-Bench), and its pictures into images/ beside it",
    "nextqa": "fetch test.csv and map_vid_vidorID.json of github.com/doc-doc/NExT-QA, and its videos into NExTVideo/ beside them",
    "pope": "fetch output/coco/*.json of github.com/RUCAIBox/POPE, and COCO's val2014 pictures into val2014/ beside them",
    "mvbench": "fetch json/ and video/ of the data set OpenGVLab/MVBench on Hugging Face, and unzip what is in video/ there",
}


def load(name: str, root: Path) -> Task:
    """A task of `READERS` from its files below `root`. Raises `DataError` for a file that is missing or of another form."""
    reader, files = READERS[name]
    paths = [find(root / name / file, FETCH[name]) for file in files]
    examples: list[Example] = []
    for path in paths:
        try:
            examples += reader(root / name, path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}, after its first {len(examples)} samples: not of the published form ({error!r})") from error
    return Task(name=name, examples=examples, max_new_tokens=16, data=digest(*paths))
