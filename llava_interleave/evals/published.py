"""The benchmarks that are read from the files of their authors: which files, where they come from, and what reads them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, LlavaError
from .multiple_choice import (
    POPE,
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
from .open_ended import SCANQA, docvqa, scanqa, vqav2
from .task import Example, Figures, Task, digest, find

Reader = Callable[[Path, Path], Iterator[Example]]


@dataclass(frozen=True, slots=True)
class Published:
    """A data set. read: what makes examples of one of its files. files: they, below a folder of the task's name; `*` is any text,
    and of numbered parts (`-00000-of-00004`) all must be there. fetch: where they come from. beside: files that readers open."""

    read: Reader
    files: tuple[str, ...]
    fetch: str
    max_new_tokens: int = 16
    figures: Figures | None = None
    beside: tuple[str, ...] = ()


TASKS: Mapping[str, Published] = {
    "ai2d": Published(
        ai2d, ("data/test-*.parquet",), "fetch data/ of the data set lmms-lab/ai2d on Hugging Face"
    ),
    "blink": Published(
        blink, ("*/val-*.parquet",), "fetch the fourteen folders of the data set BLINK-Benchmark/BLINK on Hugging Face"
    ),
    "docvqa": Published(
        docvqa, ("DocVQA/validation-*.parquet",), "fetch DocVQA/ of the data set lmms-lab/DocVQA on Hugging Face", 32
    ),
    "muirbench": Published(
        muirbench, ("data/test-*.parquet",), "fetch data/ of the data set MUIRBENCH/MUIRBENCH on Hugging Face"
    ),
    "mvbench": Published(
        mvbench,
        tuple(f"json/{name}.json" for name in VIDEOS),
        "fetch json/ and video/ of the data set OpenGVLab/MVBench on Hugging Face, and unzip what is in video/ there",
    ),
    "nextqa": Published(
        nextqa,
        ("test.csv",),
        "fetch test.csv and map_vid_vidorID.json of github.com/doc-doc/NExT-QA, and its videos into NExTVideo/ beside them",
        beside=("map_vid_vidorID.json",),
    ),
    "nlvr2": Published(
        nlvr2,
        ("test1.json",),
        "fetch nlvr2/data/test1.json of github.com/lil-lab/nlvr, and its pictures (see its README) into images/ beside it",
    ),
    "pope": Published(
        pope,
        ("coco_pope_random.json", "coco_pope_popular.json", "coco_pope_adversarial.json"),
        "fetch output/coco/*.json of github.com/RUCAIBox/POPE, and COCO's val2014 pictures into val2014/ beside them",
        figures=POPE,
    ),
    "qbench": Published(
        qbench,
        ("llvisionqa_dev.json",),
        "fetch llvisionqa_dev.json of Q-Bench (github.com/Q-Future/Q-Bench), and its pictures into images/ beside it",
    ),
    "raven": Published(
        raven,
        ("RAVEN-10000/*/RAVEN_*_test.npz",),
        "fetch RAVEN-10000 (github.com/WellyZhang/RAVEN leads to it) and unzip it, so that RAVEN-10000/center_single and six "
        "more folders lie there",
    ),
    "scanqa": Published(
        scanqa,
        ("ScanQA_v1.0_val.json",),
        "fetch ScanQA_v1.0_val.json (github.com/ATR-DBI/ScanQA, docs/dataset.md), and ScanNet's scannet_frames_25k beside it",
        32,
        SCANQA,
    ),
    "vqav2": Published(
        vqav2,
        ("v2_OpenEnded_mscoco_val2014_questions.json",),
        "fetch the questions and v2_mscoco_val2014_annotations.json of VQA v2 (visualqa.org), and COCO's val2014 pictures into "
        "val2014/ beside them",
        beside=("v2_mscoco_val2014_annotations.json",),
    ),
}  # fmt: skip


def load(name: str, root: Path) -> Task:
    """A task of `TASKS` from its files below `root`. Raises `DataError` for a file that is missing or of another form."""
    source, folder = TASKS[name], root / name
    paths = [path for pattern in source.files for path in _files(folder, pattern, source.fetch)]
    beside = [find(folder / file, source.fetch) for file in source.beside]
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
                f"{path}, after {len(examples)} samples: not of the published form ({error!r})"
            ) from error
    return Task(
        name=name,
        examples=examples,
        max_new_tokens=source.max_new_tokens,
        data=digest(*paths, *beside),
        figures=source.figures,
    )


def _files(folder: Path, pattern: str, fetch: str) -> list[Path]:
    """The files of a pattern, in order. Raises `DataError` where there are none, or numbered parts are missing."""
    if "*" not in pattern:
        return [find(folder / pattern, fetch)]
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(
            f"{folder / pattern} is not there: {fetch}. Nothing is downloaded by itself; --data names another folder"
        )
    for path in found:
        if parts := re.search(r"-(\d{5})-of-(\d{5})", path.name):
            others = f"{path.name[: parts.start()]}-*-of-{parts[2]}*{path.suffix}"
            if len(list(path.parent.glob(others))) != int(parts[2]):
                raise DataError(
                    f"of the {int(parts[2])} parts of {path.parent / others} some are missing: {fetch}"
                )
    return found
