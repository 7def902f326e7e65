"""What /openapi.json tells beside the fields of requests: the forms of messages, of answers and of refusals."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FILE_OR_URL = {
    "type": "string",
    "pattern": ":|^file-[0-9a-f]{64}$",
    "description": "A URL, a data URL, or the id of an upload.",
}
SECONDS = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}]}
SAMPLING = {
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


def _part(kind: str, needed: dict[str, Any], **more: Any) -> dict[str, Any]:
    fields = {"type": {"const": kind}, **needed}
    return {
        "type": "object",
        "properties": fields | more,
        "required": list(fields),
        "additionalProperties": False,
    }


def _url(**more: Any) -> dict[str, Any]:
    whole = {
        "type": "object",
        "properties": {"url": FILE_OR_URL, **more},
        "required": ["url"],
        "additionalProperties": False,
    }
    return {"anyOf": [FILE_OR_URL, whole]}


TEXT = {"type": "string"}
DETAIL = {"enum": ["auto", "low", "high", None]}
VIEW = {
    "type": "object",
    "properties": {"name": {"type": ["string", "null"]}, "image": TEXT},
    "required": ["image"],
}
VIEWS = [
    {"type": "object", "additionalProperties": TEXT, "minProperties": 1},
    {
        "type": "array",
        "items": {"anyOf": [TEXT, VIEW | {"additionalProperties": False}]},
        "minItems": 1,
    },
]
PARTS = [
    _part("text", {"text": TEXT}),
    _part("image_url", {"image_url": _url(detail=DETAIL)}),
    *(_part("image", {source: TEXT}) for source in ("image", "url", "path", "base64")),
    _part("video_url", {"video_url": _url()}, **SAMPLING),
    _part(
        "video",
        {"video": {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}]}},
        **SAMPLING,
    ),
    *(_part("video", {source: TEXT}, **SAMPLING) for source in ("url", "path")),
    _part("views", {"views": {"anyOf": VIEWS}}),
    _part(
        "file",
        {
            "file": {
                "type": "object",
                "properties": {"file_id": TEXT},
                "required": ["file_id"],
                "additionalProperties": False,
            }
        },
    ),
]
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [TEXT, {"type": "array", "items": {"anyOf": PARTS}}]},
        },
        "required": ["role", "content"],
        "additionalProperties": {"type": "null"},
    },
}


def nullable(schema: dict[str, Any]) -> None:
    """null stands for a field that is left out."""
    for name, field in schema["properties"].items():
        if name not in schema["required"]:
            kept = {
                key: field.pop(key) for key in ("title", "default", "description") if key in field
            }
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **kept}


class ErrorBody(BaseModel):
    """What went wrong, and with which field."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """No answer."""

    error: ErrorBody


REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": ErrorResponse,
        "description": "The request is refused: its message says why, its code is for programs.",
    },
    "5XX": {
        "model": ErrorResponse,
        "description": "The server is busy (503, with Retry-After), or has made a mistake.",
    },
}


class State(BaseModel):
    """How the server is."""

    status: Literal["ok", "ready", "failed"]


class ModelInfo(BaseModel):
    """What is served. parent: the model that an adapter is for. tokens_per_image: of the context.

    video_frames: looked at in a video where nobody says how many.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    context_length: int
    tokens_per_image: int
    video_frames: int


class Models(BaseModel):
    """All that is served."""

    object: Literal["list"]
    data: list[ModelInfo]


class File(BaseModel):
    """An upload, named by its content."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str


class Files(BaseModel):
    """All uploads of a key, oldest first."""

    object: Literal["list"]
    data: list[File]
    has_more: bool


class Deleted(BaseModel):
    """An upload that is no longer there."""

    id: str
    object: Literal["file"]
    deleted: bool


class Likely(BaseModel):
    """A token, its natural log-probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class Written(Likely):
    """A token of an answer, and the likeliest ones in its place."""

    top_logprobs: list[Likely]


class Logprobs(BaseModel):
    """Of each token of an answer."""

    content: list[Written]
    refusal: None


class Message(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class PromptDetails(BaseModel):
    """Tokens of the prompt that were computed before, and those of images."""

    cached_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(BaseModel):
    """Seconds, of the answer that ended last."""

    prepare: float
    queue: float
    vision: float
    prefill: float | None
    first_token: float | None
    total: float
    tokens_per_second: float | None


class ImageAttributionInfo(BaseModel):
    """An image's part in an answer, as `Look` of the library; a video has a map a frame."""

    name: str
    share: float | None
    change: float | None
    attention: float
    heat: list[list[list[float]]]


class Explanation(BaseModel):
    """Which image an answer leaned on. layers: of the decoder, whose attention is told. logprob: of the whole answer."""

    layers: list[int]
    logprob: float
    images: list[ImageAttributionInfo]


class AnswerExplanation(Explanation):
    """Of answer `index`."""

    index: int


class Completion(BaseModel):
    """Whole answers; explanations where they were asked for."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings
    explanations: list[AnswerExplanation] = []


ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Completion,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "The answers; with `stream` chunks of them as server-sent events, faults as an `error` event.",
    }
}
