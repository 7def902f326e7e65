"""Sources of training samples: a file, a mixture of files, or a folder of images."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import yaml

from ...errors import DataError, OptionError
from . import formats, shards

SAVED = "state.json"
"""The list of files in a folder of `datasets.Dataset.save_to_disk`."""
QUESTION = ("What is in the picture?", "What is in the pictures?")
"""Asked about one image of a folder, and about several."""
LAYOUTS = (
    "a folder is read in one of three forms: images with a text next to each, x.jpg and x.txt; a "
    "sub-folder of images per sample, with one .txt in each; or a sub-folder of images per class, "
    "without any .txt"
)


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample as it is in its file.

    root: where relative paths start. name: for people. group: its data set. place: in a file.
    pair: the name of the preference pair of which it is the chosen or the rejected side. weight:
    how often it is shown in an epoch. block: the number of the samples that are read together.
    """

    sample: Mapping[str, Any]
    root: Path
    name: str
    group: str
    place: str = ""
    pair: str = ""
    weight: float = 1.0
    block: int = -1

    def messages(self) -> tuple[list[dict[str, Any]], list[object]]:
        """Raises DataError naming the sample."""
        return formats.messages(self.sample, self.root, self.name)


def rows(
    source: Path, *, media: Path | None = None, question: str | None = None, seed: int = 0
) -> list[RawSample]:
    """All samples of `source`, as `samples`, in memory; a repeated name gets its place, and a
    preference pair becomes two samples, chosen and rejected. Raises DataError."""
    found = list(samples(source, media=media, question=question, seed=seed))
    # M4-Instruct counts the samples of each of its data sets from 0 on.
    times = Counter(row.name for row in found)
    named = [
        replace(row, name=f"{row.name} ({row.place})") if times[row.name] > 1 else row
        for row in found
    ]
    return [side for row in named for side in sides(row) or (row,)]


def samples(
    source: Path, *, media: Path | None = None, question: str | None = None, seed: int = 0
) -> Iterator[RawSample]:
    """The samples of `source`: a .json, .jsonl, .parquet, .arrow or .tar file, or a pattern of
    names with `*`, a .yaml mixture of those, a folder of images, or one of `datasets`.

    media: where relative paths start; without it at the file that has them. question: about the
    images of a folder. seed: of the random draws of a mixture. Raises DataError.
    """
    if is_image_folder(source):
        if media:
            raise OptionError(f"{source} is a folder and holds its images itself: leave out media")
        return iter(_folder(source, question))
    if question:
        raise OptionError(f"{source} is a file and asks its own questions: leave out question")
    if source.suffix in (".yaml", ".yml"):
        return _mixture(source, media, seed)
    if source.is_dir():
        return (row for path in files(source) for row in _file(path, media))
    return _file(source, media)


def is_image_folder(source: Path) -> bool:
    """Whether a folder holds images, and is not one of `datasets.Dataset.save_to_disk`.

    Raises DataError for several splits.
    """
    if (splits := source / "dataset_dict.json").exists():
        names = json.loads(splits.read_text("utf-8")).get("splits", [])
        raise DataError(f"{source} has the splits {', '.join(names)}: name the folder of one")
    return source.is_dir() and not (source / SAVED).exists()


def sides(row: RawSample) -> tuple[RawSample, RawSample] | None:
    """The chosen and the rejected side of a preference pair; None for another sample."""
    if (pair := formats.sides(row.sample)) is None:
        return None
    chosen, rejected = pair
    return (
        replace(row, sample=chosen, name=f"{row.name}, chosen", pair=row.name),
        replace(row, sample=rejected, name=f"{row.name}, rejected", pair=row.name),
    )


KTO_LABEL = "kto_label"


def mismatched(rows: Iterable[RawSample]) -> Iterator[RawSample]:
    """Samples of KTO as pairs, of which `kto_label` says whether the answer is desirable.

    The other answer of a pair is that of the sample before (of the first, of the second), to the
    same question: its log-probabilities estimate the KL divergence from the reference model.
    Raises DataError for a sample without a label, and for one alone.
    """
    waiting: tuple[RawSample, Any] | None = None
    before: Any = None
    for row in rows:
        found = formats.labelled(row.sample)
        if not found:
            raise DataError(
                f"sample {row.name} has no answer with a `label`, true or false, and kto learns "
                "from those"
            )
        for number, (sample, label) in enumerate(found):
            answer = sample["messages"][-1]
            kind = (", chosen", ", rejected")[number] if len(found) == 2 else ""
            this = replace(row, sample=sample | {KTO_LABEL: label}, name=row.name + kind)
            if waiting:
                yield _with_other(waiting[0], answer)
                waiting = None
            if before is None:
                waiting = this, answer
            else:
                yield _with_other(this, before)
            before = answer
    if waiting:
        raise DataError(f"kto needs two samples at least, and {waiting[0].name} is alone")


def unlabelled(row: RawSample) -> RawSample:
    """A labelled sample of KTO as one of fine-tuning; another as it is."""
    if any(type(row.sample.get(key)) is bool for key in formats.LABELS):
        found = formats.labelled(row.sample)
        return replace(row, sample=found[0][0]) if len(found) == 1 else row
    return row


def _with_other(row: RawSample, answer: Any) -> RawSample:
    return replace(row, sample={**row.sample, "rejected_messages": [answer]})


def held_out(groups: Mapping[str, Sequence[int]], share: float, seed: int) -> list[int]:
    """The numbers of the held-out `share` (rounded) of every data set, by seed.

    groups: numbers of the samples of each.
    """
    return sorted(
        number
        for group, members in groups.items()
        for number in Random(f"split/{seed}/{group}").sample(members, round(share * len(members)))
    )


def _file(source: Path, media: Path | None) -> Iterator[RawSample]:
    if "*" in source.name:
        for path in files(source):
            yield from _file(path, media)
        return
    if source.suffix in shards.SUFFIXES:
        for number, (sample, block) in enumerate(shards.rows(source), 1):
            yield replace(_row(sample, media or source.parent, source, number), block=block)
        return
    if source.suffix not in (".json", ".jsonl"):
        raise DataError(
            f"{source} is not a .json, .jsonl, .parquet, .tar or .yaml file and not a folder; "
            "docs/training.md has the forms"
        )
    for number, sample in enumerate(formats.read(source), 1):
        yield _row(sample, media or source.parent, source, number)


def files(source: Path) -> list[Path]:
    """The files that a source is read from, of a pattern in its name all that fit.

    Raises DataError.
    """
    if source.suffix in (".yaml", ".yml"):
        below = [files(source.parent / entry["json_path"]) for entry in mixture(source)]
        return [source, *(path for some in below for path in some)]
    if (state := source / SAVED).exists():
        try:
            listed = json.loads(state.read_text("utf-8"))["_data_files"]
            return [source / entry["filename"] for entry in listed]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{state} is not one of `datasets`: {error!r}") from error
    if url := shards.url_of(source):
        found = [Path(name) for name, _ in shards.remote_files(url)]
    elif "*" not in source.name:
        return [source]
    else:
        found = sorted(source.parent.glob(source.name))
    if not found:
        raise DataError(f"there is no file {source}")
    return found


def _row(sample: Mapping[str, Any], root: Path, source: Path, number: int) -> RawSample:
    name = formats.first(sample, "id", "sample_id")
    about = sample.get("metadata")
    group = about.get("dataset") if isinstance(about, Mapping) else None
    place = f"{number} of {source.name}"
    return RawSample(
        sample, root, place if name is None else str(name), str(group or source.stem), place
    )


def mixture(source: Path) -> list[dict[str, Any]]:
    """The entries of a mixture, `datasets:`: each `json_path` and `sampling_strategy`, as in
    LLaVA-NeXT's train.py, and `weight`, how often its samples are shown in an epoch."""
    try:
        text = yaml.safe_load(source.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{source} cannot be read as YAML: {error}") from error
    listed = (
        text.get("datasets") if isinstance(text, dict) and text.keys() == {"datasets"} else None
    )
    if not isinstance(listed, list) or not listed:
        raise DataError(
            f"{source} must have one key, `datasets`: a list of `json_path` with "
            "`sampling_strategy`"
        )
    for number, entry in enumerate(listed, 1):
        where = f"data set {number} of {source}"
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise DataError(f"{where} has no `json_path`")
        if other := entry.keys() - {"json_path", "sampling_strategy", "weight"}:
            raise DataError(
                f"{where} has {', '.join(sorted(map(str, other)))}, which is not supported: "
                "take it out"
            )
        weight = entry.get("weight", 1.0)
        if type(weight) not in (int, float) or not 0 < weight <= 1000:
            raise DataError(
                f"{where} has the weight {weight!r}; it is how often a sample is shown in an "
                "epoch, a number above 0 and at most 1000"
            )
    return listed


def _mixture(source: Path, media: Path | None, seed: int) -> Iterator[RawSample]:
    for number, entry in enumerate(mixture(source), 1):
        where, path = f"data set {number} of {source}", source.parent / entry["json_path"]
        strategy = entry.get("sampling_strategy", "all")
        weight = float(entry.get("weight", 1.0))
        for row in sampled(partial(_file, path, media), strategy, where, f"{seed}/{number}"):
            yield row if weight == 1.0 else replace(row, weight=weight)


def sampled(
    read: Callable[[], Iterator[RawSample]], strategy: object, where: str, seed: str
) -> Iterator[RawSample]:
    """The samples of a strategy: all, first:N, end:N or random:N; a percentage N is rounded up."""
    if strategy == "all":
        return read()
    fits = re.fullmatch(r"(first|end|random):([0-9]+)(%?)", str(strategy))
    # The original takes all for what it does not know, 30% without a way among them, and for end:0.
    if not fits or int(fits[2]) == 0:
        raise DataError(
            f"{where} has the sampling_strategy {strategy!r}; there are all, first:N, end:N and "
            "random:N, where N is a number from 1 on or a percentage such as 30%"
        )
    length = sum(1 for _ in read())
    count = min(length, math.ceil(int(fits[2]) * length / 100) if fits[3] else int(fits[2]))
    if fits[1] == "random":
        return _picked(read(), Random(f"mixture/{seed}").sample(range(length), count))
    return islice(read(), count) if fits[1] == "first" else islice(read(), length - count, None)


def _picked(found: Iterator[RawSample], numbers: list[int]) -> Iterator[RawSample]:
    """The samples of the numbers, in their order; only these are in memory."""
    wanted = set(numbers)
    kept = {number: row for number, row in enumerate(found) if number in wanted}
    return (kept[number] for number in numbers)


def _folder(folder: Path, question: str | None) -> list[RawSample]:
    """The samples of a folder. Every file counts except hidden ones, also one that is no image."""
    entries = _entries(folder)
    folders = [entry for entry in entries if entry.is_dir()]
    if not entries or len(folders) not in (0, len(entries)):
        raise DataError(
            f"{folder} holds {len(folders)} folders and {len(entries) - len(folders)} files: "
            f"{LAYOUTS}"
        )

    def row(name: str, images: Sequence[Path], answer: str, group: str, places: int) -> RawSample:
        asked = "<image>\n" * places + (question or QUESTION[places > 1])
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        shown = [str(image.relative_to(folder)) for image in images]
        return RawSample({"id": name, "image": shown, "conversations": turns}, folder, name, group)

    if not folders:
        texts = {entry.stem: entry for entry in entries if entry.suffix.lower() == ".txt"}
        images = [entry for entry in entries if entry not in texts.values()]
        alone = [
            text for stem, text in texts.items() if stem not in {image.stem for image in images}
        ]
        found = [
            row(p.name, [p], _text(texts[p.stem]) if p.stem in texts else "", folder.name, 1)
            for p in images
        ]
        return found + [row(text.name, [], _text(text), folder.name, 1) for text in alone]
    inside = {one: _entries(one) for one in folders}
    texts_of = {
        one: [entry for entry in held if entry.suffix.lower() == ".txt"]
        for one, held in inside.items()
    }
    if not any(texts_of.values()):
        return [
            row(f"{one.name}/{p.name}", [p], one.name.replace("_", " "), one.name, 1)
            for one, held in inside.items()
            for p in held
        ]
    if many := next((one for one, texts in texts_of.items() if len(texts) > 1), None):
        raise DataError(f"{many} holds {len(texts_of[many])} .txt files: {LAYOUTS}")
    found = []
    for one, held in inside.items():
        shown = [entry for entry in held if entry not in texts_of[one]]
        answer = _text(texts_of[one][0]) if texts_of[one] else ""
        found.append(row(one.name, shown, answer, folder.name, max(1, len(shown))))
    return found


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, in natural order: 2.png before 10.png."""
    held = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(
        held,
        key=lambda p: (
            [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", p.name)],
            p.name,
        ),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8: {error}") from error
