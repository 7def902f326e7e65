"""Samples in the M4-Instruct / LLaVA JSON form become messages and media."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..processing import Processor

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read(path: Path) -> list[dict[str, Any]]:
    """The samples of a `.json` or `.jsonl` file. Raises DataError with the line of a mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        found = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, list) or not found or not all(isinstance(s, dict) for s in found):
        raise DataError(f"{path} must be a list of samples, each an object with `conversations`")
    return found


def messages(sample: Mapping[str, Any], root: Path) -> tuple[list[dict[str, str]], list[object]]:
    """The messages of a sample, with `<image>` where its media stand, and the media, relative to `root`.

    Raises DataError with the sample's id for anything that does not fit.
    """
    name = sample.get("id", sample.get("sample_id", "without id"))
    turns = sample.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"sample {name} has no `conversations`")
    said = []
    for number, turn in enumerate(turns, 1):
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role not in ROLES or not isinstance(text, str) or not text.strip():
            raise DataError(
                f"turn {number} of sample {name} must have a role of {', '.join(ROLES)} and a text; its role is {role!r}"
            )
        said.append({"role": ROLES[role], "content": text})
    if said[-1]["role"] != "assistant":
        raise DataError(f"sample {name} ends with a question: there is nothing to learn")
    media = [sample["video"]] if "video" in sample else sample.get("image", [])
    media = [media] if isinstance(media, str) else media
    marks = sum(turn["content"].count("<image>") for turn in said)
    if marks != len(media):
        raise DataError(f"sample {name} has {marks} `<image>` but {len(media)} images or videos")
    return said, [root / item if isinstance(item, str) else item for item in media]


@cache
def processor(folder: Path) -> Processor:
    """The processor of a checkpoint folder, read once in each process."""
    return Processor.from_folder(folder)
