"""Benchmarks read from the files of their authors: which files, where they come from, and their
readers.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError, LlavaError
from .multiple_choice import (
    POPE_METRICS,
    VIDEOS,
    ai2d,
    blink,
    muirbench,
    mvbench,
    nextqa,
    nlvr2,
    pope,
    qbench,
    raven,
)
from .open_ended import SCANQA_METRICS, docvqa, scanqa, vqav2
from .task import AggregateMetrics, Example, Task, digest, require_file

Reader = Callable[[Path, Path], Iterator[Example]]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set.

    read: makes examples from one file. files: patterns below a folder with the task's name; of
    numbered parts (`-00000-of-00004`) all must exist. fetch: where they come from. extra_files:
    other files that the reader opens. paper: as `Task.paper`.
    """

    read: Reader
    files: tuple[str, ...]
    fetch: str
    max_new_tokens: int = 16
    metrics: AggregateMetrics | None = None
    extra_files: tuple[str, ...] = ()
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


CARDS = "lmms-eval, as the model cards of LLaVA-OneVision and LLaVA-Video say"
TASKS: Mapping[str, Dataset] = {
    "ai2d": Dataset(
        ai2d,
        ("data/test-*.parquet",),
        "fetch data/ of the data set lmms-lab/ai2d on Hugging Face",
        paper={
            "OneVision 0.5b-si": {"AI2D": 54.2},
            "OneVision 0.5b-ov": {"AI2D": 57.1},
            "OneVision 72b-si": {"AI2D": 85.1},
        },
    ),
    "blink": Dataset(
        blink,
        ("*/val-*.parquet",),
        "fetch the fourteen folders of the data set BLINK-Benchmark/BLINK on Hugging Face",
    ),
    "docvqa": Dataset(
        docvqa,
        ("DocVQA/validation-*.parquet",),
        "fetch DocVQA/ of the data set lmms-lab/DocVQA on Hugging Face",
        32,
        paper={
            "OneVision 0.5b-si": {"DocVQA": 75.0},
            "OneVision 0.5b-ov": {"DocVQA": 73.7},
            "OneVision 72b-si": {"DocVQA": 93.5},
        },
    ),
    "muirbench": Dataset(
        muirbench,
        ("data/test-*.parquet",),
        "fetch data/ of the data set MUIRBENCH/MUIRBENCH on Hugging Face",
    ),
    "mvbench": Dataset(
        mvbench,
        tuple(f"json/{name}.json" for name in VIDEOS),
        "fetch json/ and video/ of the data set OpenGVLab/MVBench on Hugging Face, and unzip what "
        "is in video/ there",
    ),
    "nextqa": Dataset(
        nextqa,
        ("test.csv",),
        "fetch test.csv and map_vid_vidorID.json of github.com/doc-doc/NExT-QA, and its videos "
        "into NExTVideo/ next to them",
        extra_files=("map_vid_vidorID.json",),
        paper={"LLaVA-Video 7B": {"NExT-QA": 83.2}, "LLaVA-Video 72B": {"NExT-QA": 85.4}},
    ),
    "nlvr2": Dataset(
        nlvr2,
        ("test1.json",),
        "fetch nlvr2/data/test1.json of github.com/lil-lab/nlvr, and its images (see its README) "
        "into images/ next to it",
    ),
    "pope": Dataset(
        pope,
        ("coco_pope_random.json", "coco_pope_popular.json", "coco_pope_adversarial.json"),
        "fetch output/coco/*.json of github.com/RUCAIBox/POPE, and COCO's val2014 images into "
        "val2014/ next to them",
        metrics=POPE_METRICS,
    ),
    "qbench": Dataset(
        qbench,
        ("llvisionqa_dev.json",),
        "fetch llvisionqa_dev.json of Q-Bench (github.com/Q-Future/Q-Bench), and its images into "
        "images/ next to it",
    ),
    "raven": Dataset(
        raven,
        ("RAVEN-10000/*/RAVEN_*_test.npz",),
        "fetch RAVEN-10000 (github.com/WellyZhang/RAVEN leads to it) and unzip it, so that "
        "RAVEN-10000/center_single and six "
        "more folders lie there",
    ),
    "scanqa": Dataset(
        scanqa,
        ("ScanQA_v1.0_val.json",),
        "fetch ScanQA_v1.0_val.json (github.com/ATR-DBI/ScanQA, docs/dataset.md), and ScanNet's "
        "scannet_frames_25k next to it",
        32,
        SCANQA_METRICS,
    ),
    "vqav2": Dataset(
        vqav2,
        ("v2_OpenEnded_mscoco_val2014_questions.json",),
        "fetch the questions and v2_mscoco_val2014_annotations.json of VQA v2 (visualqa.org), and "
        "COCO's val2014 images into "
        "val2014/ next to them",
        extra_files=("v2_mscoco_val2014_annotations.json",),
    ),
}


def load(name: str, root: Path) -> Task:
    """A task of `TASKS` from its files below `root`. Raises `DataError` for a missing file or
    another format.
    """
    source, folder = TASKS[name], root / name
    paths = [path for pattern in source.files for path in _files(folder, pattern, source.fetch)]
    extra_files = [require_file(folder / file, source.fetch) for file in source.extra_files]
    examples: list[Example] = []
    for path in paths:
        try:
            examples += source.read(folder, path)
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OSError,
            zipfile.BadZipFile,
        ) as error:
            if isinstance(error, LlavaError):
                raise
            raise DataError(
                f"{path}, after {len(examples)} samples: not in the published format ({error!r})"
            ) from error
    return Task(
        name=name,
        examples=examples,
        max_new_tokens=source.max_new_tokens,
        data=digest(*paths, *extra_files),
        metrics=source.metrics,
        paper=source.paper,
        pipeline=CARDS if source.paper else "",
    )


def _files(folder: Path, pattern: str, fetch: str) -> list[Path]:
    """The files of a pattern, in order. Raises `DataError` for none, and for missing numbered
    parts.
    """
    if "*" not in pattern:
        return [require_file(folder / pattern, fetch)]
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise DataError(
            f"{folder / pattern} does not exist: {fetch}. Nothing is downloaded; --data names "
            "another folder"
        )
    for path in paths:
        if parts := re.search(r"-(\d{5})-of-(\d{5})", path.name):
            others = f"{path.name[: parts.start()]}-*-of-{parts[2]}*{path.suffix}"
            if len(list(path.parent.glob(others))) != int(parts[2]):
                raise DataError(
                    f"of the {int(parts[2])} parts of {path.parent / others} some are missing: "
                    f"{fetch}"
                )
    return paths
