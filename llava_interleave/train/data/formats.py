"""Training samples become messages and media.

Forms: M4-Instruct / LLaVA, OpenAI messages, Hugging Face chat columns, preference pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import DataError, LlavaError
from ...processing import FrameSampling, Processor
from ...processing.chat_template import MediaPlaceholder, parse

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
UNSUPPORTED_KEYS = ("weight", "tool_calls", "function_call")
"""Keys of OpenAI's messages that change the loss and are not supported."""
PAIR = (
    "prompt",
    "question",
    "chosen",
    "rejected",
    "text",
    "answer",
    "messages",
    "conversations",
    "image_path",
)
"""Keys of a preference pair that its two conversations replace."""
ANIMATED = (".gif", ".webp")
"""Suffixes of files that are images, unless a content part says video."""
URL = re.compile(r"(https?|file)://|data:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DataIssue:
    """A fault of a sample: its kind, and a sentence with the sample's name; else a remark."""

    kind: str
    text: str
    error: bool = True


@dataclass(slots=True)
class Reading:
    """A sample as messages.

    slots: all its media placeholders. media: of the slots without a source, in order.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    slots: list[MediaPlaceholder] = field(default_factory=list)
    media: list[object] = field(default_factory=list)
    faults: list[DataIssue] = field(default_factory=list)


def read(path: Path) -> list[dict[str, Any]]:
    """The samples of a `.json` or `.jsonl` file. Raises DataError with the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    line = 0
    try:
        if path.suffix == ".jsonl":
            found: Any = []
            for row in text.split("\n"):  # not splitlines: JSON's texts may hold other line ends
                line += 1
                found += [json.loads(row)] if row.strip() else []
        else:
            found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{f'line {line} of ' if line else ''}{path} is not JSON: {error}"
        ) from error
    if not isinstance(found, list) or not found or not all(isinstance(s, dict) for s in found):
        raise DataError(
            f"{path} must be a list of samples, each an object with `conversations` or `messages`"
        )
    return found


def messages(
    sample: Mapping[str, Any], root: Path, name: str = ""
) -> tuple[list[dict[str, Any]], list[object]]:
    """The messages of a sample, and the media of their `<image>` and parts without a source.

    Relative paths start from `root`. Raises DataError with the sample's name, by default its id.
    """
    found = reading(sample, root, name)
    if wrong := next((fault for fault in found.faults if fault.error), None):
        raise DataError(wrong.text)
    return found.messages, found.media


def reading(sample: Mapping[str, Any], root: Path, name: str = "") -> Reading:
    """A sample and all faults that can be found without opening a file."""
    name = name or str(first(sample, "id", "sample_id", "without id"))
    found = Reading()

    def fault(kind: str, text: str) -> None:
        found.faults.append(DataIssue(kind, text))

    images = [
        rooted(item, root) for key in ("image", "images") for item in _listed(sample.get(key))
    ]
    video = sample.get("video")  # one, though it may be a list of frames
    videos = [
        rooted(item, root)
        for item in [*([video] if _listed(video) else []), *_listed(sample.get("videos"))]
    ]
    turns = first(sample, "conversations", "messages")
    if not isinstance(turns, list) or not turns:
        fault("form", f"sample {name} has no `conversations` or `messages`")
        return found
    if sample.get("tools") or sample.get("functions"):
        fault("form", f"sample {name} has tools, which are not supported: take them out")
    used: set[int] = set()
    for number, turn in enumerate(turns, 1):
        turn = turn if isinstance(turn, Mapping) else {}
        role, content = first(turn, "from", "role"), first(turn, "value", "content")
        fits = isinstance(role, str) and role in ROLES and isinstance(content, str | list)
        empty = fits and _empty(content, ROLES[role])
        if not fits or empty:
            text = f"turn {number} of sample {name} must have a role of {', '.join(ROLES)} and a text; its role is {role!r}"
            fault("empty" if empty else "form", text + (" and its text is empty" if empty else ""))
        if unsupported := [key for key in UNSUPPORTED_KEYS if turn.get(key) not in (None, [], 1)]:
            fault(
                "form",
                f"turn {number} of sample {name} has `{unsupported[0]}`, which is not supported: "
                "take it out",
            )
        if not fits:
            continue
        if isinstance(content, list):
            try:
                content = [_part(part, root, images, used) for part in content]
            except IndexError:
                fault(
                    "placeholders",
                    f"turn {number} of sample {name} points behind its {len(images)} images",
                )
                return found
        found.messages.append({"role": ROLES[role], "content": content})
    order = [turn["role"] for turn in found.messages]
    if order[-1:] != ["assistant"] and order:
        fault("roles", f"sample {name} ends with a question: there is nothing to learn")
    if found.messages and not any(f.kind == "form" for f in found.faults):
        _place(found, [item for i, item in enumerate(images) if i not in used], videos, name)
    if "system" in order[1:]:
        fault(
            "roles",
            f"sample {name} has a system message that is not its first: put it there, or take it out",
        )
    if next((role for role in order if role != "system"), None) == "assistant":
        fault("roles", f"sample {name} begins with an answer: its roles seem to be swapped")
    if twice := next((i for i in range(1, len(order)) if order[i] == order[i - 1]), None):
        fault(
            "roles",
            f"messages {twice} and {twice + 1} of sample {name} are both of the {order[twice]}: join them",
        )
    return found


def _place(found: Reading, images: list[object], videos: list[object], name: str) -> None:
    """Give every slot without a source its image or video; numbers that do not fit are a fault."""
    try:
        turns = parse(found.messages, FrameSampling())
    except LlavaError as error:
        found.faults.append(DataIssue("form", f"sample {name}: {error}"))
        return
    pieces = [(turn.role, part) for turn in turns for part in turn.parts]
    placed = [
        (role, p)
        for role, part in pieces
        for p in ([part] if isinstance(part, MediaPlaceholder) else part)
        if isinstance(p, MediaPlaceholder)
    ]
    found.slots = [slot for _, slot in placed]
    vacant = [slot for slot in found.slots if slot.source is None]
    given = len(images) + len(videos)
    wrong = ""
    if len(vacant) != given:
        wrong = f"sample {name} has {len(vacant)} `<image>` but {given} images or videos"
    elif images and videos and any(slot.kind is None for slot in vacant):
        wrong = f"sample {name} has images and videos, and `<image>` does not say which stands where: give content parts"
    else:
        rest = {"image": iter(images), "video": iter(videos)}
        found.media = [
            next(rest[slot.kind or ("video" if videos else "image")], None) for slot in vacant
        ]
        if any(item is None for item in found.media):
            wrong = f"sample {name} has {len(images)} images and {len(videos)} videos, but its parts want other numbers of them"
    if any(slot.kind is None for slot in vacant) and any(
        str(video).lower().endswith(ANIMATED) for video in videos
    ):
        text = f"sample {name} has an animation as its video, of which `<image>` shows one frame: give content parts"
        found.faults.append(DataIssue("form", text))
    if wrong:
        found.faults.append(DataIssue("placeholders", wrong))
        found.slots = [slot for slot in found.slots if slot.source is not None] + [
            MediaPlaceholder() for _ in range(given)
        ]
        found.media = [*images, *videos]  # so that they are looked at all the same
    if placed and all(role == "assistant" for role, _ in placed):
        text = f"sample {name} has its images in answers alone: its roles may be swapped"
        found.faults.append(DataIssue("roles", text, error=False))


def sides(sample: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The two conversations of a preference pair; None for what is none.

    `chosen` and `rejected` are texts that answer `prompt` (TRL, LLaVA-Hound) or `question` (RLHF-V, RLAIF-V), the messages
    that follow it, or whole conversations (TRL without a prompt). Images that no text places stand before the first question.
    """
    if (
        isinstance(text := sample.get("text"), str) and "chosen" not in sample
    ):  # RLHF-V keeps the pair as JSON in a column
        try:
            inner = json.loads(text)
        except ValueError:
            return None
        sample = {**sample, **(inner if isinstance(inner, dict) else {})}
    if sample.get("chosen") is None or sample.get("rejected") is None:
        return None
    asked = first(sample, "prompt", "question") or []
    before = (
        [{"role": "user", "content": asked}]
        if isinstance(asked, str)
        else [dict(turn) for turn in asked]
    )
    rest = {key: value for key, value in sample.items() if key not in PAIR}
    if "image" not in rest and "images" not in rest and isinstance(sample.get("image_path"), str):
        rest["image"] = sample["image_path"]
    made = []
    for answer in (sample["chosen"], sample["rejected"]):
        after = (
            [{"role": "assistant", "content": answer}]
            if isinstance(answer, str)
            else [dict(turn) for turn in answer]
        )
        made.append({**rest, "messages": _shown([*before, *after], rest)})
    return made[0], made[1]


def _shown(said: list[dict[str, Any]], rest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages with `<image>` for `<video>` in texts; if no message has a place, the first question gets one for each media."""
    texts = [turn for turn in said if isinstance(turn.get("content"), str)]
    for turn in texts:
        turn["content"] = turn["content"].replace("<video>", "<image>")
    if len(texts) == len(said) and not any("<image>" in turn["content"] for turn in texts):
        count = sum(len(_listed(rest.get(key))) for key in ("image", "images", "videos")) + bool(
            _listed(rest.get("video"))
        )
        if asked := next((turn for turn in said if turn.get("role") == "user"), None):
            asked["content"] = "<image>\n" * count + asked["content"]
    return said


def first(row: Mapping[str, Any], one: str, other: str, default: object = None) -> Any:
    """What stands under the first of two names that has anything: tables fill up columns with nothing."""
    return next((row[key] for key in (one, other) if row.get(key) is not None), default)


def rooted(item: Any, root: Path) -> Any:
    """A source whose relative path begins at `root`. Parquet's {bytes, path} becomes what is there of it."""
    if isinstance(item, Mapping) and {"bytes", "path"} & item.keys():
        item = item["path"] if item.get("bytes") is None else item["bytes"]
    if isinstance(item, list | tuple):
        return [rooted(one, root) for one in item]
    return root / item if isinstance(item, str | Path) and not URL.match(str(item)) else item


def _part(part: Any, root: Path, images: list[object], used: set[int]) -> Any:
    """A content part without empty keys (Parquet fills up with them), its paths rooted, its `index` looked up in the images."""
    if not isinstance(part, Mapping):
        return part
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "image" and isinstance(index := part.get("index"), int):
        part = {"type": "image", "image": images[index]}
        used.add(index)
    for key in part.keys() & {"image", "video", "path"}:
        part[key] = rooted(part[key], root)
    for key in part.keys() & {"url", "image_url", "video_url"}:
        value = part[key]
        part[key] = (
            {**value, "url": _url(value.get("url"), root)}
            if isinstance(value, Mapping)
            else _url(value, root)
        )
    if isinstance(views := part.get("views"), Mapping):
        part["views"] = {name: rooted(view, root) for name, view in views.items()}
    elif isinstance(views, list):
        part["views"] = [
            {**view, "image": rooted(view.get("image"), root)}
            if isinstance(view, Mapping)
            else rooted(view, root)
            for view in views
        ]
    return part


def _url(text: Any, root: Path) -> Any:
    """A path that stands where OpenAI has a URL becomes one, which keeps `detail` with it."""
    return (
        (root / text).absolute().as_uri() if isinstance(text, str) and not URL.match(text) else text
    )


def _listed(value: Any) -> list[Any]:
    if value is None or (isinstance(value, str) and not value):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _empty(content: str | list[Any], role: str) -> bool:
    """Whether a turn says nothing. A question may be a picture alone, an answer may not."""
    if isinstance(content, str):
        return not (content.replace("<image>", "") if role == "assistant" else content).strip()
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    silent = not any(isinstance(text, str) and not _empty(text, role) for text in texts)
    return silent and (role == "assistant" or all(kind == "text" for kind in kinds))


@cache
def processor(folder: Path) -> Processor:
    """The processor of a checkpoint folder, read once in each process."""
    return Processor.from_folder(folder)
