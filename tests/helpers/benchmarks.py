"""Shared by tests: see tests/test_evals.py."""

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_interleave.errors import LlavaError
from llava_interleave.evals import interleave, multiple_choice
from llava_interleave.evals.task import Messages


def save_image(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), colour).save(path)


def sample(
    number: int, dataset: str, kind: str, *turns: str, images: int | None = None
) -> dict[str, Any]:
    """A sample in the published form: turns are questions and answers in turn."""
    said = [
        {"from": who, "value": text}
        for who, text in zip(("human", "gpt") * len(turns), turns, strict=False)
    ]
    count = sum(text.count("<image>") for text in turns) if images is None else images
    return {
        "sample_id": number,
        "conversations": said,
        "image": [f"Split1/{dataset}/{number}-{i}.png" for i in range(count)],
        "choice_list": None,
        "metadata": {
            "dataset": dataset,
            "split": "val",
            "num_sample": 9,
            "task_instruction": "",
            "question_type": kind,
        },
    }


def bench(root: Path, samples: Sequence[Any], name: str = "interleave-in") -> Path:
    folder = root / "interleave"
    for one in samples:
        for file in (
            one["image"] if isinstance(one, dict) and isinstance(one.get("image"), list) else ()
        ):
            save_image(folder / file)
    (folder / interleave.FILES[name]).write_text(json.dumps(samples))
    return root


WHOLE = [
    sample(1, "RAVEN", "multi-choice", "Which of <image> and <image>?", "A"),
    sample(1, "Spot-the-Diff", "open-ended", "<image><image>What differs?", "a red car is gone"),
    sample(2, "Spot-the-Diff", "open-ended", "<image> and <image>", "nothing"),
    sample(2, "RAVEN", "multi-choice", "<image>?", "C", "And <image>?", "B", "Sure?", "A"),
    sample(1, "CLEVR-Change", "open-ended", "<image>", "the cube moved"),
]


def said(answers: dict[str, str]) -> Any:
    """Something that answers by the last question, and keeps the messages it got."""

    def answer(batch: Sequence[Messages]) -> list[str | LlavaError]:
        answer.received += list(batch)  # type: ignore[attr-defined]
        texts = [
            "".join(part.get("text", "<image>") for part in messages[-1]["content"])
            for messages in batch
        ]
        return [answers.get(text, "") for text in texts]

    answer.received = []  # type: ignore[attr-defined]
    return answer


BROKEN = [
    (
        sample(1, "RAVEN", "multi-choice", "<image>", "A", images=2),
        "1 <image>, but it has 2 images",
    ),
    (sample(1, "RAVEN", "multi-choice", "<image>"), "human instead of human and gpt"),
    (sample(1, "RAVEN", "essay", "<image>", "A"), "'essay'"),
    ({"sample_id": 4, "image": [], "metadata": {}}, "lacks 'conversations'"),
    (sample(1, "RAVEN", "multi-choice") | {"image": "a.png"}, "not a list of file names"),
    ("text", "not in the benchmark's format"),
]


def kill_and_resume(
    work: Any, chance: random.Random, *, most: int = 20, longest: float = 0.05
) -> int:
    """Run `work` in a child that is killed at random moments, until it ends by itself; how often it
    was killed, `most` times at most and each time after at most `longest` seconds.
    """
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            except Exception:  # noqa: BLE001  the child must not return
                os._exit(1)
        deadline = time.monotonic() + (chance.uniform(0.0, longest) if kills < most else 60)
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0
                return kills
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1


def pixels(colour: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (20, 10), colour).save(file, "PNG")
    return file.getvalue()


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A file as Hugging Face's `datasets` writes it, images embedded as bytes and path; a row
    group a row.
    """
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as file

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = dict.fromkeys(("image", "image_1", "image_2", "image_3", "image_4"), image) | {
        "image_list": pa.list_(image)
    }
    columns = {name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    file.write_table(pa.table(columns), path, row_group_size=1)


def embedded(colour: str) -> dict[str, Any]:
    return {"bytes": pixels(colour), "path": None}


def made(root: Path, name: str) -> None:
    """A few samples of a data set in the form that its authors publish."""
    folder = root / name
    (folder / "json").mkdir(parents=True)
    if name == "nlvr2":
        rows = [
            {"identifier": f"test1-0-1-{i}", "sentence": "Two dogs.", "label": label}
            for i, label in enumerate(("True", "False"))
        ]
        (folder / "test1.json").write_text("\n".join(map(json.dumps, rows)))
    elif name == "qbench":
        row = {
            "img_path": "00051.jpg",
            "type": 1,
            "concern": 0,
            "question": "How clear is it?",
            "candidates": ["Blurry", "Clear"],
        }
        (folder / "llvisionqa_dev.json").write_text(json.dumps([row | {"correct_ans": "Clear"}]))
    elif name == "nextqa":
        (folder / "map_vid_vidorID.json").write_text('{"4010069381": "1164/4010069381"}')
        (folder / "test.csv").write_text(
            "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
            '4010069381,369,640,480,how do the two man play,2,6,CH,roll,"tap, feet",strum,hit,pat\n'
        )
    elif name == "pope":
        for split in ("random", "popular", "adversarial"):
            row = {
                "question_id": 1,
                "image": "COCO_val2014_000000310196.jpg",
                "text": "Is there a snowboard in the image?",
            }
            rows = [row | {"label": "yes"}, row | {"label": "no", "question_id": 2}]
            (folder / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
    elif name == "raven":
        for kind in ("center_single", "distribute_nine"):
            (folder / "RAVEN-10000" / kind).mkdir(parents=True)
            image = np.arange(16, dtype=np.uint8)[:, None, None].repeat(160, 1).repeat(160, 2)
            about = {
                "image": image,
                "target": 3,
                "predict": 1,
                "meta_matrix": np.zeros((8, 9)),
                "structure": np.array(["Scene", "/"]),
            }
            np.savez_compressed(folder / "RAVEN-10000" / kind / "RAVEN_8_test.npz", **about)
    elif name == "scanqa":
        row = {
            "scene_id": "scene0011_00",
            "object_ids": [8],
            "object_names": ["cabinet"],
            "question_id": "val-scene0011-0",
        }
        rows = [
            row | {"question": "What is in the corner?", "answers": ["brown cabinet", "cabinet"]}
        ]
        (folder / "ScanQA_v1.0_val.json").write_text(json.dumps(rows))
        for i in range(40):
            save_image(folder / f"scannet_frames_25k/scene0011_00/color/{i * 100:06}.jpg")
    elif name == "blink":
        row = {
            "question": "How many?",
            "sub_task": "Counting",
            "choices": ["0", "2", "3"],
            "answer": "(B)",
            "explanation": "",
        }
        row |= {
            "prompt": "How many dogs are there?\nSelect from the following choices.\n"
            "(A) 0\n(B) 2\n(C) 3"
        }
        rows = [
            row
            | {
                "idx": f"val_Counting_{i}",
                "image_1": embedded("red"),
                "image_2": embedded("blue") if i else None,
            }
            | {"image_3": None, "image_4": None}
            for i in range(2)
        ]
        parquet(folder / "Counting/val-00000-of-00001.parquet", rows)
        jigsaw = [rows[0] | {"idx": "val_Jigsaw_1", "sub_task": "Jigsaw"}]
        parquet(folder / "Jigsaw/val-00000-of-00001.parquet", jigsaw)
    elif name == "muirbench":
        row = {
            "task": "Counting",
            "image_relation": "Independent",
            "image_type": "Photography",
            "counterpart_idx": "",
        }
        row |= {
            "question": "Between <image> and <image>, which has dogs?",
            "options": ["<image>", "None of them"],
            "answer": "A",
        }
        for part in range(2):
            images = [embedded(colour) for colour in ("red", "blue", "green")]
            parquet(
                folder / f"data/test-0000{part}-of-00002.parquet",
                [row | {"idx": str(part), "image_list": images}],
            )
    elif name == "ai2d":
        row = {
            "question": "What is E?",
            "options": ["a worm", "a bird", "a leaf"],
            "answer": "1",
            "image": embedded("red"),
        }
        parquet(folder / "data/test-00000-of-00001-2ce340398c113b79.parquet", [row, row])
    elif name == "docvqa":
        row = {
            "questionId": "49153",
            "question": "What is the date?",
            "question_types": ["form"],
            "docId": 14465,
        }
        row |= {
            "answers": ["8 May 1988", "May 8, 1988"],
            "image": embedded("red"),
            "data_split": "val",
        }
        parquet(folder / "DocVQA/validation-00000-of-00001.parquet", [row])
    elif name == "vqav2":
        questions = [
            {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}
        ]
        people = ["down"] * 6 + ["at table"] * 2 + ["skateboard", "the table."]
        about = {
            "question_type": "none of the above",
            "multiple_choice_answer": "down",
            "answer_type": "other",
        }
        answers = [
            {"answer": said, "answer_confidence": "yes", "answer_id": i}
            for i, said in enumerate(people, 1)
        ]
        (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(
            json.dumps({"questions": questions})
        )
        annotations = [about | {"answers": answers, "image_id": 262148, "question_id": 262148000}]
        (folder / "v2_mscoco_val2014_annotations.json").write_text(
            json.dumps({"annotations": annotations})
        )
    else:
        for task in multiple_choice.VIDEOS:
            row = {
                "video": "a.mp4",
                "question": "What next?",
                "candidates": ["Ran", "Sat", "Fell"],
                "answer": "Sat",
            }
            bound = (
                {"start": 1.0, "end": 2.0}
                if task in (*multiple_choice.TIMED, "episodic_reasoning")
                else {}
            )
            (folder / "json" / f"{task}.json").write_text(json.dumps([row | bound]))
        for i in range(1, 12):
            save_image(folder / f"video/tvqa/frames_fps3_hq/a.mp4/{i:05}.jpg")
