"""The `messages` of a request: JSON schema, limits, and uploads in the place of file ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import PromptError
from ..processing.formats import is_video
from .settings import Settings

FILE_ID = re.compile(r"file-[0-9a-f]{64}")
MEDIA_FIELDS = ("image_url", "video_url", "image", "video", "views")
"""Fields of a content part that may name an upload."""
DATA_FIELDS = (*MEDIA_FIELDS, "url", "path", "base64")

FILE_OR_URL = {
    "type": "string",
    "pattern": ":|^file-[0-9a-f]{64}$",
    "description": "A URL, a data URL, or the id of an upload.",
}
SECONDS = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}]}
FRAME_SAMPLING = {
    "frames": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
    "fps": {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]},
    "times": {
        "anyOf": [
            {"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 1},
            {"type": "null"},
        ]
    },
    "start": SECONDS,
    "end": SECONDS,
}


UNSUPPORTED_IN_MESSAGES = ("tool_calls", "function_call", "audio")
IGNORED_IN_MESSAGES: dict[str, type] = {
    "name": str,
    "refusal": str,
    "reasoning": str,
    "reasoning_content": str,
    "annotations": list,
    "id": str,
    "cache_control": dict,
}
"""Fields that clients copy from responses, or that are hints for another server's cache."""
IGNORED_IN_PARTS = ("cache_control", "uuid", "id")


def _object(
    required: dict[str, Any], optional: dict[str, Any] | None = None, more: Any = False
) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": more,
    }


def _part_schema(kind: str, required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return _object({"type": {"const": kind}, **required}, optional, more={"type": "null"})


def _url(**optional: Any) -> dict[str, Any]:
    return {"anyOf": [FILE_OR_URL, _object({"url": FILE_OR_URL}, optional)]}


TEXT = {"type": "string"}
DETAIL = {"enum": ["auto", "low", "high", "original", None]}
VIEW = _object({"image": TEXT}, {"name": {"type": ["string", "null"]}})
VIEWS = [
    {"type": "object", "additionalProperties": TEXT, "minProperties": 1},
    {"type": "array", "items": {"anyOf": [TEXT, VIEW]}, "minItems": 1},
]
FRAMES = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}]}
PARTS = [
    TEXT,
    _part_schema("text", {"text": TEXT}),
    _part_schema("image_url", {"image_url": _url(detail=DETAIL)}),
    *(_part_schema("image", {source: TEXT}) for source in ("image", "url", "path", "base64")),
    _part_schema("video_url", {"video_url": _url()}, **FRAME_SAMPLING),
    _part_schema("video", {"video": FRAMES}, **FRAME_SAMPLING),
    *(_part_schema("video", {source: TEXT}, **FRAME_SAMPLING) for source in ("url", "path")),
    _part_schema("views", {"views": {"anyOf": VIEWS}}),
    _part_schema("file", {"file": _object({"file_id": TEXT})}),
    _part_schema(
        "file",
        {
            "file": _object(
                {"file_data": {"type": "string", "pattern": "^data:"}},
                {"filename": {"type": ["string", "null"]}},
            )
        },
    ),
]
INPUT_PARTS = [
    *PARTS,
    _part_schema("input_text", {"text": TEXT}),
    _part_schema(
        "output_text",
        {"text": TEXT},
        annotations={"anyOf": [{"type": "array", "maxItems": 0}, {"type": "null"}]},
        logprobs={"type": ["array", "null"]},
    ),
    _part_schema("input_image", {"image_url": FILE_OR_URL}, detail=DETAIL),
    _part_schema("input_image", {"file_id": TEXT}, detail=DETAIL),
    _part_schema("input_file", {"file_id": TEXT}),
]
MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": _object(
        {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [TEXT, {"type": "array", "items": {"anyOf": PARTS}}]},
        },
        {"name": {"type": ["string", "null"]}},
        more={"type": "null"},
    ),
}


ITEM_STATES = ("in_progress", "completed", "incomplete")
INPUT_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": _object(
        {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [TEXT, {"type": "array", "items": {"anyOf": INPUT_PARTS}}]},
        },
        {
            "type": {"enum": ["message", None]},
            "id": {"type": ["string", "null"]},
            "status": {"enum": [*ITEM_STATES, None]},
            "phase": {"type": ["string", "null"]},
        },
        more={"type": "null"},
    ),
}
"""Messages of /v1/responses."""
NO_ITEM = {
    "item_reference": "responses are not stored; send the message itself",
    **dict.fromkeys(
        ("function_call", "function_call_output"),
        "this server has no tools; put the result into a user message",
    ),
}
"""Items of /v1/responses that are refused, and what to use instead."""


def input_messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages among the items of /v1/responses. Raises PromptError for items of tools."""
    messages = []
    for number, item in enumerate(items, 1):
        kind = "message" if item.get("type") is None else item["type"]
        if kind == "reasoning":  # of another model, as reasoning_content is
            continue
        if kind != "message":
            hint = NO_ITEM.get(str(kind), "input has messages")
            raise PromptError(f"item {number} of input is a {str(kind)[:60]}: {hint}")
        message = dict(item)
        state, phase = message.pop("status", None), message.pop("phase", None)
        if state not in (None, *ITEM_STATES) or not isinstance(phase, str | None):
            raise PromptError(f"item {number} of input has an unknown status or phase")
        message.pop("type", None)
        messages.append(message)
    if not messages:
        raise PromptError("the input has no messages")
    return messages


def resolve_messages(
    messages: list[dict[str, Any]], upload: Callable[[str], bytes], settings: Settings
) -> list[dict[str, Any]]:
    """Messages as the processor reads them: null fields dropped, uploads in the place of their ids.

    Raises PromptError over the limits of `settings`, and whatever `upload` raises for an unknown
    id.
    """
    turns = [_clean_message(message, i) for i, message in enumerate(messages, 1)]
    contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    if (parts := len(turns) + sum(map(len, contents))) > settings.max_parts:
        raise PromptError(
            f"the request has {parts} messages and parts; the limit is {settings.max_parts}"
        )
    for turn in turns:
        if isinstance(turn.get("content"), list):
            turn["content"] = [_resolve_part(part, upload) for part in turn["content"]]
    if (characters := sum(map(_characters, turns))) > settings.max_characters:
        raise PromptError(
            f"the request has {characters:,} characters of text; "
            f"the limit is {settings.max_characters:,}"
        )
    return turns


def _clean_message(message: dict[str, Any], number: int) -> dict[str, Any]:
    """A message without the fields that clients send and that ask for nothing here."""
    message = {name: value for name, value in message.items() if value is not None}
    role = message.get("role")
    for name in UNSUPPORTED_IN_MESSAGES:
        if message.pop(name, None):
            raise PromptError(
                f"message {number} has {name}, but this server has no tools; for an answer as JSON "
                "use response_format"
            )
    if role in ("tool", "function"):
        raise PromptError(
            f"message {number} has the role {role!r}, but this server has no tools; "
            "put the result into a user message"
        )
    for name, kind in IGNORED_IN_MESSAGES.items():
        if not isinstance(message.pop(name, kind()), kind):
            raise PromptError(f"message {number} has a {name} that is not a {kind.__name__}")
    if role == "developer":
        message["role"] = "system"
    if role == "assistant":
        message.setdefault("content", "")
    if isinstance(message.get("content"), list):
        message["content"] = [_clean_part(part) for part in message["content"]]
    return message


def _clean_part(part: Any) -> Any:
    """A content part in the form of chat completions, without what asks for nothing here."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    part = {name: value for name, value in part.items() if value is not None}
    for name in IGNORED_IN_PARTS:
        part.pop(name, None)
    for name in ("annotations", "logprobs"):  # of an answer's text
        if isinstance(part.get(name), list) and (name == "logprobs" or not part[name]):
            del part[name]
    kind = part.get("type")
    if kind in ("image", "image_url") and part.get("modalities") in ("image", "multi-images"):
        del part["modalities"]  # SGLang's
    if kind in ("input_text", "output_text"):  # of /v1/responses
        part["type"] = "text"
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind == "input_file":
        return {"type": "file", "file": {name: part[name] for name in part if name != "type"}}
    if kind == "input_image":
        url = part.pop("image_url", None) or part.pop("file_id", None)
        part |= {"type": "image_url", "image_url": url}
    if part.get("type") == "image_url" and "detail" in part:
        url = part["image_url"]
        image = url if isinstance(url, dict) else {"url": url}
        part["image_url"] = {"detail": part.pop("detail"), **image}
    for name in ("image_url", "video_url"):
        if isinstance(part.get(name), dict):
            part[name] = {key: value for key, value in part[name].items() if value is not None}
            if part[name].get("detail") == "original":
                part[name]["detail"] = "high"
            if isinstance(url := part[name].get("url"), str):
                part[name]["url"] = url.strip()
        elif isinstance(part.get(name), str):
            part[name] = part[name].strip()
    return part


def has_media(turns: list[dict[str, Any]]) -> bool:
    """Whether a part is not text."""
    contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    return any(
        not isinstance(part, dict) or part.get("type") != "text"
        for parts in contents
        for part in parts
    )


FILE_DATA = {"file_data", "filename"}


def _resolve_part(part: Any, upload: Callable[[str], bytes]) -> Any:
    """A part with uploads in the place of their ids; the chat template validates it."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "file":
        file = part.get("file")
        file = {k: v for k, v in file.items() if v is not None} if isinstance(file, dict) else {}
        data, whole = file.get("file_data"), set(part) == {"type", "file"}
        whole &= isinstance(file.get("filename", ""), str)
        if whole and isinstance(data, str) and data.startswith("data:") and set(file) <= FILE_DATA:
            kind = "video" if data.startswith("data:video/") else "image"
            return {"type": kind, "url": data}
        if not whole or set(file) != {"file_id"}:
            raise PromptError(
                "a file is an image or a video: {'type': 'file', 'file': {'file_id': 'file-...'}}, "
                "uploaded to /v1/files first, or with file_data as a data: URL; this one has "
                f"{', '.join(sorted({*file, *part} - {'type', 'file'}))[:100] or 'neither'}"
            )
        data = upload(str(file["file_id"]))
        kind = "video" if is_video(data) else "image"
        return {"type": kind, kind: data}
    for source in _sources(part):
        if not isinstance(source, str | None):
            raise PromptError(
                f"the source of an image or a video must be a string, not {type(source).__name__}"
            )
    return {
        name: _resolve_ids(value, upload) if name in MEDIA_FIELDS else value
        for name, value in part.items()
    }


def _sources(part: dict[str, Any]) -> Iterator[Any]:
    """Media sources where the chat template also accepts decoded images, which JSON cannot hold."""
    video, views = part.get("video"), part.get("views")
    yield part.get("image")
    yield from video if isinstance(video, list) else [video]
    if isinstance(views, dict):
        yield from views.values()
    elif isinstance(views, list):
        yield from (view.get("image") if isinstance(view, dict) else view for view in views)


def _resolve_ids(value: Any, upload: Callable[[str], bytes]) -> Any:
    if isinstance(value, str):
        return upload(value) if FILE_ID.fullmatch(value) else value
    if isinstance(value, list):
        return [_resolve_ids(item, upload) for item in value]
    if isinstance(value, dict):
        return {name: _resolve_ids(item, upload) for name, item in value.items()}
    return value


def _characters(value: Any, text: bool = True) -> int:
    """Characters to tokenize, names of views included; URLs and data of media do not count."""
    if isinstance(value, dict):
        return sum(
            len(name)
            + _characters(item, name in ("text", "name") or (text and name not in DATA_FIELDS))
            for name, item in value.items()
        )
    if isinstance(value, list):
        return sum(_characters(item, text) for item in value)
    return len(value) if text and isinstance(value, str) else 0
