"""Training samples become messages and media.

Read are M4-Instruct and LLaVA, OpenAI messages, Hugging Face chat columns, the forms of TRL,
LLaMA-Factory, ms-swift and axolotl, and preference pairs; docs/training.md lists them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import DataError, LlavaError
from ...processing import FrameSampling, Processor
from ...processing.chat_template import MediaPlaceholder, Turn, parse
from ...processing.formats import IMAGE_SUFFIXES
from . import keys, shards

MEDIA_TYPES = ("image", "image_url", "video", "video_url")

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
CONVERSATIONS = ("conversations", "messages")
PAIR = ("chosen", "rejected", "rejected_response", "rejected_messages")
LABELS = ("label", "kto_tag")
FORMS: tuple[tuple[str, ...], ...] = (
    CONVERSATIONS,
    ("prompt", "completion"),
    ("instruction", "input", "output"),
    ("query", "response"),
)
"""Keys of the forms of a conversation; the first form of which a sample has a key is read."""
WITH_HISTORY = FORMS[2:]
"""Forms whose earlier turns are in `history`."""
ANIMATED = (".gif", ".webp")
"""Suffixes of files that are images, unless a content part says video."""
MAX_WEIGHT = 1000
"""Of the loss of a sample or of an answer."""
URL = re.compile(r"(https?|file)://|data:", re.IGNORECASE)
TAG = re.compile(r"(<image>|<video>)")
BLOCK = 1 << 20
"""Characters of a JSON list that are read at once."""
SEPARATOR = re.compile(r"\s*([,\]])\s*")


@dataclass(frozen=True, slots=True)
class DataIssue:
    """A fault of a sample: its kind, and a sentence with the sample's name; else a remark."""

    kind: str
    text: str
    error: bool = True


@dataclass(slots=True)
class Reading:
    """A sample as messages.

    slots: all its media placeholders. media: of the slots without a source, in order. ignored: keys
    that were not read.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    slots: list[MediaPlaceholder] = field(default_factory=list)
    media: list[object] = field(default_factory=list)
    faults: list[DataIssue] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)


class ParsedSample(dict[str, Any]):
    """A sample and the JSON that it was read from, in one line."""

    __slots__ = ("text",)

    def __init__(self, sample: Mapping[str, Any], text: str) -> None:
        super().__init__(sample)
        self.text = text.replace("\n", " ")


class _NotASample(Exception):
    """Why a sample has no conversation."""


def read(path: Path) -> Iterator[ParsedSample]:
    """The samples of a `.json` or `.jsonl` file, a few in memory at a time.

    Raises DataError with the line.
    """
    empty = True
    for sample, text in _lines(path) if path.suffix == ".jsonl" else _list(path):
        empty = False
        if not isinstance(sample, dict):
            raise DataError(
                f"{path} must be a list of samples, each an object with `conversations` or "
                "`messages`"
            )
        yield ParsedSample(sample, text)
    if empty:
        raise DataError(f"{path} must be a list of samples, and not empty")


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    line = 0
    try:
        with path.open(
            encoding="utf-8-sig", newline="\n"
        ) as file:  # texts may have other line ends
            for text in file:
                line += 1
                if text.strip():
                    yield json.loads(text), text.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"line {line} of {path} is not JSON: {error}") from error


def _list(path: Path) -> Iterator[tuple[Any, str]]:
    """The values of a JSON list and their texts, read in blocks."""
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(BLOCK)
            begin = re.match(r"\s*\[\s*", text)
            while begin:
                at = begin.end()
                try:
                    value, end = decoder.raw_decode(text, at)
                    begin, value_text = SEPARATOR.match(text, end), text[at:end]
                except json.JSONDecodeError:
                    begin = None
                if begin is None:
                    more = file.read(max(BLOCK, len(text) - at))
                    if not more:
                        break
                    text = text[at:] + more
                    begin = re.match(r"\s*", text)
                    continue
                yield value, value_text
                if begin[1] == "]":
                    if (text[begin.end() :] + file.read()).strip():
                        break
                    return
        if json.loads(path.read_text("utf-8-sig")) != []:
            raise DataError(f"{path} must be a list of samples, and not empty")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def messages(
    sample: Mapping[str, Any], root: Path, name: str = ""
) -> tuple[list[dict[str, Any]], list[object]]:
    """The messages of a sample, and the media of their `<image>` and parts without a source.

    A message without loss has `"loss": False`. Relative paths start from `root`. Raises DataError
    with the sample's name, by default its id.
    """
    result = reading(sample, root, name)
    if error := next((fault for fault in result.faults if fault.error), None):
        raise DataError(error.text)
    return result.messages, result.media


def reading(sample: Mapping[str, Any], root: Path, name: str = "") -> Reading:
    """A sample and all faults that can be found without opening a file."""
    name = name or str(first(sample, "id", "sample_id", default="without id"))
    result = Reading()

    def fault(kind: str, text: str) -> None:
        result.faults.append(DataIssue(kind, text))

    refused = dict(keys.refused(sample))
    for key, reason in refused.items():
        fault("form", f"sample {name} has `{key}`: {reason}")
    try:
        form, turns = _conversation(sample)
    except _NotASample as error:
        fault("form", f"sample {name} {error}")
        return result
    result.ignored = keys.ignored(
        sample, {*form, *keys.MEDIA, *keys.META, *keys.WEIGHTS, "history", *refused}
    )
    if form not in WITH_HISTORY and _given(sample.get("history")):
        fault("form", f"sample {name} has `history` next to its messages: put it into them")
    images, videos = _media(sample, root)
    if wrong := next((item for item in [*images, *videos] if not _is_source(item)), None):
        fault("form", f"sample {name} has {wrong!r} among its media, which is not a path or a URL")
    used: set[int] = set()
    try:
        whole = math.prod(_weight(sample, key) for key in keys.WEIGHTS)
    except ValueError as error:
        fault("form", f"sample {name} has {error}")
        whole = 1.0
    for number, turn in enumerate(turns, 1):
        where = f"turn {number} of sample {name}"
        turn = turn if isinstance(turn, Mapping) else {}
        role = first(turn, "from", "role")
        content = _text_of_number(first(turn, "value", "content"))
        fits = isinstance(role, str) and role in ROLES and isinstance(content, str | list)
        empty = fits and _is_empty(content, ROLES[role])
        if not fits or empty:
            fault(
                "empty" if empty else "form",
                f"{where} must have a role of {', '.join(ROLES)} and a text; its role is {role!r} "
                f"and its text is {'empty' if empty else repr(content)[:60]}",
            )
        for key, reason in keys.refused(turn, message=True):
            fault("form", f"{where} has `{key}`: {reason}")
        if not fits:
            continue
        if isinstance(content, list):
            try:
                content = [_part(part, root, images, used) for part in content]
            except IndexError:
                fault("placeholders", f"{where} has an `index` beyond its {len(images)} images")
                return result
        message: dict[str, Any] = {"role": ROLES[role], "content": content}
        try:
            if (weight := _loss(turn) * whole) != 1:
                message["loss"] = weight or False
        except ValueError as error:
            fault("form", f"{where} has {error}")
        result.messages.append(message)
    answers = [one for one in result.messages if one["role"] == "assistant"]
    if result.messages and result.messages[-1]["role"] != "assistant":
        fault("roles", f"sample {name} ends with a question: there is nothing to learn")
    elif answers and not any(one.get("loss", True) for one in answers):
        fault("roles", f"sample {name} has no answer with loss: there is nothing to learn")
    if result.messages and not any(one.kind == "form" for one in result.faults):
        unused = [item for i, item in enumerate(images) if i not in used]
        tagged = any("from" in turn for turn in turns if isinstance(turn, Mapping))
        _place(result, unused, videos, name, insert=not tagged)
    _check_order(result, name)
    return result


PLAIN_KEYS = {"id", "sample_id", "image", "conversations", "metadata"}
PLAIN_ROLES = ("human", "gpt")


def plain_turns(sample: Mapping[str, Any]) -> tuple[list[str], list[str]] | None:
    """Questions and answers in turn, and names of images, of a sample in M4-Instruct's form in
    which `reading` finds no fault; None for another sample.

    Its images are files with the suffix of an image.
    """
    if not sample.keys() <= PLAIN_KEYS:
        return None
    turns, names = sample.get("conversations"), _listed(sample.get("image"))
    if type(turns) is not list or not turns or len(turns) % 2:
        return None
    texts: list[str] = []
    places = 0
    for number, turn in enumerate(turns):
        answer = number % 2
        if type(turn) is not dict or turn.keys() != {"from", "value"}:
            return None
        text = turn["value"]
        if turn["from"] != PLAIN_ROLES[answer] or type(text) is not str or not text.strip():
            return None
        count = text.count("<image>")
        if "<video>" in text or (answer and count):
            return None
        places += count
        texts.append(text)
    if places != len(names):
        return None
    for name in names:
        if type(name) is not str or not name.lower().endswith(IMAGE_SUFFIXES) or URL.match(name):
            return None
    return texts, names


def _conversation(sample: Mapping[str, Any]) -> tuple[tuple[str, ...], list[Any]]:
    """The form of a sample's conversation, and its messages, a system message first.

    Raises _NotASample.
    """
    form = next((one for one in FORMS if any(_given(sample.get(key)) for key in one)), None)
    if form is None:
        raise _NotASample("has no `conversations` or `messages`")
    if form == CONVERSATIONS:
        turns = first(sample, *CONVERSATIONS)
        if not isinstance(turns, list) or not turns:
            raise _NotASample("has no list of messages in `conversations` or `messages`")
    elif form[0] == "prompt":
        if not _given(sample.get("completion")):
            raise _NotASample("has a `prompt` without a `completion`, and no messages")
        before = [_without_loss(turn) for turn in _turns(sample.get("prompt"), "user")]
        turns = [*before, *_turns(sample["completion"], "assistant")]
    else:
        question, answer = (
            (sample.get("instruction"), sample.get("output"))
            if form[0] == "instruction"
            else (sample.get("query"), sample.get("response"))
        )
        question = _text_of_number(question)
        if _given(more := _text_of_number(sample.get("input"))) and form[0] == "instruction":
            question = f"{question}\n{more}" if _given(question) else more
        turns = [
            *_history(sample.get("history")),
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    if not _given(system := sample.get("system")):
        return form, list(turns)
    opening = turns[0] if isinstance(turns[0], Mapping) else {}
    if first(opening, "from", "role") == "system":
        if first(opening, "value", "content") != system:
            raise _NotASample("has a `system` and another system message: leave out one of them")
        return form, list(turns)
    return form, [{"role": "system", "content": system}, *turns]


def _history(history: Any) -> list[dict[str, Any]]:
    """Earlier turns, as pairs of question and answer. Raises _NotASample."""
    turns: list[dict[str, Any]] = []
    for pair in history or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _NotASample("has a `history` that is not a list of [question, answer]")
        turns += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    return turns


def _turns(value: Any, role: str) -> list[Any]:
    """A text, a message or a list of messages as messages; a text is one of the `role`."""
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list):
        return value
    return [{"role": role, "content": value}] if _given(value) else []


def _without_loss(turn: Any) -> Any:
    answer = isinstance(turn, Mapping) and ROLES.get(str(first(turn, "from", "role"))) != "user"
    return {**turn, "loss": False} if answer else turn


def _loss(turn: Mapping[str, Any]) -> float:
    """The weight that a message's own keys give its loss; of a question 1. Raises ValueError."""
    answers = ROLES.get(str(first(turn, "from", "role"))) == "assistant"
    weight = _weight(turn, "weight")
    for key in ("loss", "train"):
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise ValueError(f"`{key}` {value!r}: it may be 0 or 1, false or true")
        if value and not answers:
            raise ValueError(f"`{key}` {value!r}, and only answers are trained on: take it out")
        weight *= bool(value)
    return weight if answers else 1.0


def has_weight(sample: Mapping[str, Any]) -> bool:
    """Whether a sample or one of its messages has a weight that is not 0 or 1."""
    turns = [turn for key in CONVERSATIONS for turn in sample.get(key) or ()]
    return any(
        row.get(key) not in (None, 0, 1)
        for row in [sample, *turns]
        if isinstance(row, Mapping)
        for key in keys.WEIGHTS
    )


def _weight(row: Mapping[str, Any], key: str) -> float:
    """The weight of the loss of a sample or a message. Raises ValueError."""
    value = row.get(key)
    if value is None:
        return 1.0
    if not isinstance(value, int | float) or not 0 <= value <= MAX_WEIGHT:
        raise ValueError(f"`{key}` {value!r}: a weight is a number from 0 to {MAX_WEIGHT}")
    return float(value)


def _check_order(result: Reading, name: str) -> None:
    roles = [message["role"] for message in result.messages]

    def fault(text: str) -> None:
        result.faults.append(DataIssue("roles", f"sample {name} {text}"))

    if "system" in roles[1:]:
        fault("has a system message that is not its first: put it there, or take it out")
    if next((role for role in roles if role != "system"), None) == "assistant":
        fault("begins with an answer: its roles seem to be swapped")
    for i in range(1, len(roles)):
        if roles[i] == roles[i - 1]:
            result.faults.append(
                DataIssue(
                    "roles",
                    f"messages {i} and {i + 1} of sample {name} are both of the {roles[i]}: "
                    "join them",
                )
            )
            break


def _place(
    result: Reading, images: list[object], videos: list[object], name: str, *, insert: bool
) -> None:
    """Give every slot without a source its image or video; numbers that do not fit are a fault.

    insert: without any slot, media go before the text of the first question.
    """
    count = len(images) + len(videos)
    _tags_to_parts(result.messages, images, videos)
    try:
        found = placeholders(result.messages, count)
        if insert and count and not found:
            _insert_media(result.messages, len(images), len(videos))
            found = placeholders(result.messages, count)
        result.slots, roles = [slot for slot, _ in found], [role for _, role in found]
    except LlavaError as error:
        result.faults.append(DataIssue("form", f"sample {name}: {error}"))
        return
    vacant = [slot for slot in result.slots if slot.source is None]
    wrong = ""
    if len(vacant) != count:
        wrong = f"sample {name} has {len(vacant)} `<image>` but {count} images or videos"
    elif images and videos and any(slot.kind is None for slot in vacant):
        wrong = (
            f"sample {name} has images and videos, and `<image>` does not say which belongs where: "
            "write `<video>`, or give content parts"
        )
    else:
        rest = {"image": iter(images), "video": iter(videos)}
        result.media = [
            next(rest[slot.kind or ("video" if videos else "image")], None) for slot in vacant
        ]
        if any(item is None for item in result.media):
            wrong = (
                f"sample {name} has {len(images)} images and {len(videos)} videos, "
                "but its parts want other numbers of them"
            )
    if any(slot.kind is None for slot in vacant) and any(
        str(video).lower().endswith(ANIMATED) for video in videos
    ):
        result.faults.append(
            DataIssue(
                "form",
                f"sample {name} has an animation as its video, of which `<image>` shows one frame: "
                "give content parts",
            )
        )
    if wrong:
        result.faults.append(DataIssue("placeholders", wrong))
        placed = [slot for slot in result.slots if slot.source is not None]
        result.slots = placed + [MediaPlaceholder() for _ in range(count)]
        result.media = [*images, *videos]  # so that they are validated all the same
    if roles and all(role == "assistant" for role in roles):
        result.faults.append(
            DataIssue(
                "roles",
                f"sample {name} has its images in answers alone: its roles may be swapped",
                error=False,
            )
        )


def placeholders(
    messages: Sequence[Mapping[str, Any]], media: int
) -> list[tuple[MediaPlaceholder, str]]:
    """The media placeholders of messages, and the role of the message of each.

    media: how many the sample has apart from those that parts name. `<image>` in a text is text
    where parts place all media, as in a prompt.
    """
    return [
        (piece, turn.role)
        for turn in turns_of(messages, media)
        for part in turn.parts
        for piece in ([part] if isinstance(part, MediaPlaceholder) else part)
        if isinstance(piece, MediaPlaceholder)
    ]


def turns_of(messages: Sequence[Mapping[str, Any]], media: int) -> list[Turn]:
    """The parsed messages; media: as of `placeholders`. Raises PromptError.

    Without media parts each `<image>` is a placeholder, so that one without an image is noticed.
    """
    by_parts = any(
        isinstance(part, Mapping) and part.get("type") in (*MEDIA_TYPES, "views")
        for message in messages
        if isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple)
        for part in message["content"]
    )
    return parse(messages, FrameSampling(), media if by_parts else None)


def _tags_to_parts(said: list[dict[str, Any]], images: list[object], videos: list[object]) -> None:
    """`<video>` in texts becomes `<image>` or, with images next to videos, a content part."""
    if not videos:
        return
    for message in said:
        content = message["content"]
        if not isinstance(content, str) or "<video>" not in content:
            continue
        if not images:
            message["content"] = content.replace("<video>", "<image>")
            continue
        message["content"] = [
            {"type": piece[1:-1]} if piece in ("<image>", "<video>") else
            {"type": "text", "text": piece}
            for piece in TAG.split(content)
            if piece
        ]  # fmt: skip


def _insert_media(said: list[dict[str, Any]], images: int, videos: int) -> None:
    """Places for media before the text of the first question."""
    if question := next((one for one in said if one["role"] == "user"), None):
        content = question["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        media = [{"type": "image"}] * images + [{"type": "video"}] * videos
        question["content"] = [*media, *parts]


def sides(sample: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The two conversations of a preference pair; None for a sample that is not a pair.

    The answers are `chosen` and `rejected`, or the last message and `rejected_response` (ms-swift):
    texts, messages, or whole conversations. The question is `prompt` (TRL, LLaVA-Hound), `question`
    (RLHF-V, RLAIF-V) or the messages (LLaMA-Factory).
    """
    if isinstance(text := sample.get("text"), str) and "chosen" not in sample:
        try:  # RLHF-V keeps the pair as JSON in a column
            inner = json.loads(text)
        except ValueError:
            inner = None
        sample = {**sample, **inner} if isinstance(inner, dict) else sample
    before = _turns(first(sample, "prompt", "question", *CONVERSATIONS), "user")
    chosen, rejected = sample.get("chosen"), first(sample, "rejected", *PAIR[2:])
    if chosen is None and rejected is not None and before:
        before, chosen = before[:-1], before[-1]
    if chosen is None or rejected is None:
        return None
    dropped = {"prompt", "question", "text", "answer", *CONVERSATIONS, *PAIR}
    rest = {key: value for key, value in sample.items() if key not in dropped}
    both = []
    for answer in (chosen, rejected):
        after = _turns(answer, "assistant") or [{"role": "assistant", "content": answer}]
        opening = after[0] if isinstance(after[0], Mapping) else {}
        whole = ROLES.get(str(first(opening, "from", "role"))) in ("user", "system")
        repeated = [_said(turn) for turn in after[: len(before)]] == [_said(t) for t in before]
        turns = after if whole and repeated else [*before, *after]
        both.append({**rest, "messages": [_with_role(turn) for turn in turns]})
    return both[0], both[1]


def labelled(sample: Mapping[str, Any]) -> list[tuple[dict[str, Any], bool]]:
    """The conversations of a sample for KTO, each with whether its last answer is desirable.

    One with `label` (TRL, ms-swift) or `kto_tag` (LLaMA-Factory), true or false; of a preference
    pair both; of another sample none.
    """
    if pair := sides(sample):
        return [(pair[0], True), (pair[1], False)]
    label = first(sample, *LABELS)
    rest = {key: value for key, value in sample.items() if key not in LABELS}
    try:
        form, turns = _conversation(rest)
    except _NotASample:
        return []
    if type(label) is not bool:
        return []
    dropped = {*form, "history", "system"}
    rest = {key: value for key, value in rest.items() if key not in dropped}
    return [({**rest, "messages": [_with_role(turn) for turn in turns]}, label)]


def _with_role(turn: Any) -> Any:
    """A message in OpenAI's names, so that its media need no `<image>`."""
    if not isinstance(turn, Mapping):
        return turn
    other = {key: value for key, value in turn.items() if key not in ("from", "value")}
    role, content = first(turn, "from", "role"), first(turn, "value", "content")
    return {**other, "role": role, "content": content}


def _said(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    return ROLES.get(str(first(turn, "from", "role"))), first(turn, "value", "content")


def first(row: Mapping[str, Any], *names: str, default: object = None) -> Any:
    """The first value that is not None; tables fill columns up with None."""
    for key in names:
        if (value := row.get(key)) is not None:
            return value
    return default


def _given(value: Any) -> bool:
    return value is not None and value != "" and value != []


def _text_of_number(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and type(value) is not bool else value


def _media(sample: Mapping[str, Any], root: Path) -> tuple[list[object], list[object]]:
    """Images and videos of a sample, their relative paths from `root`."""
    images = [item for key in ("image", "images") for item in _listed(sample.get(key))]
    images = images or _listed(sample.get("image_path"))
    video = sample.get("video")  # one, though it may be a list of frames
    videos = [*([video] if _listed(video) else []), *_listed(sample.get("videos"))]
    return [rooted(item, root) for item in images], [rooted(item, root) for item in videos]


def _is_source(item: object) -> bool:
    if isinstance(item, list | tuple):
        return bool(item) and all(map(_is_source, item))
    return item is not None and not isinstance(item, bool | int | float | Mapping)


def rooted(item: Any, root: Path) -> Any:
    """A source whose relative path starts from `root`; of a place in a file its bytes, of Parquet's
    {bytes, path} what is there."""
    if isinstance(item, Mapping) and shards.FILE in item:
        return shards.fetch(item)
    if isinstance(item, Mapping) and {"bytes", "path"} & item.keys():
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
    if isinstance(item, list | tuple):
        return [rooted(one, root) for one in item]
    if isinstance(item, str):
        return item if URL.match(item) else root / item
    return root / item if isinstance(item, Path) else item


def _part(part: Any, root: Path, images: list[object], used: set[int]) -> Any:
    """A content part without empty keys (Parquet has them), with rooted paths.

    `index` is looked up in the images, whose numbers are noted in `used`. Raises IndexError.
    """
    if not isinstance(part, Mapping):
        return part
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "image" and type(index := part.get("index")) is int:
        if index < 0:
            raise IndexError
        used.add(index)
        return {"type": "image", "image": images[index]}  # its path is rooted already
    if part.get("type") == "text" and "text" in part:
        part["text"] = _text_of_number(part["text"])
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
    """A path in the place of OpenAI's URL becomes a URL, so that it keeps its `detail`."""
    return (
        (root / text).absolute().as_uri() if isinstance(text, str) and not URL.match(text) else text
    )


def _listed(value: Any) -> list[Any]:
    if value is None or (isinstance(value, str) and not value):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_empty(content: str | list[Any], role: str) -> bool:
    """Whether a turn says nothing. A question may be an image alone, an answer may not."""
    if isinstance(content, str):
        return not (TAG.sub("", content) if role == "assistant" else content).strip()
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    texts = [_text_of_number(text) for text in texts]
    silent = not any(isinstance(text, str) and not _is_empty(text, role) for text in texts)
    return silent and (role == "assistant" or all(kind == "text" for kind in kinds))


@cache
def processor(folder: Path) -> Processor:
    """The processor of a checkpoint folder, read once in each process."""
    return Processor.from_folder(folder)
