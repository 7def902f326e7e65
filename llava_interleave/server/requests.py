"""What a request may say. Every field is honoured, or refused by name; nothing is ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from ..chat.attachments import is_video
from ..errors import OptionError, PromptError
from ..options import Options
from .api_errors import ApiError
from .attribution import How
from .responses import MESSAGES, nullable
from .settings import Settings
from .uploads import FILE_ID

DEPTH = 24
"""Levels of nesting in a request; an image in a message has six."""
WIDTH = 4096
"""Items of any one list or object: what is wrong with each is found before anything is told."""
SOURCES = ("image_url", "video_url", "image", "video", "views")
"""Where a message part names media, and so may name an uploaded file."""
MEDIA = (*SOURCES, "url", "path", "base64")
OPTIONS = [f.name for f in dataclasses.fields(Options) if f.name not in ("logit_bias", "logprobs")]


class Strict(BaseModel):
    """Nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class PromptRequest(Strict):
    """Messages, and how their images and videos are looked at: all that a prompt is made of.

    Beyond OpenAI's fields: anyres, frames, fps, start, end and frame_times, as in `llava ask`.
    """

    model_config = ConfigDict(json_schema_extra=nullable)

    messages: Annotated[list[dict[str, Any]], Field(min_length=1), WithJsonSchema(MESSAGES)]
    model: str | None = None
    anyres: bool = False
    frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[float, Field(ge=0.001)] | None = None
    start: Annotated[float, Field(ge=0)] | None = None
    end: Annotated[float, Field(ge=0)] | None = None
    frame_times: bool = False

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        """Bounded lists and nesting; null is what a client sends for a field that it does not set."""
        level = [data]
        for _ in range(DEPTH):
            inside = [
                item.values() if isinstance(item, dict) else item
                for item in level
                if isinstance(item, dict | list)
            ]
            if any(len(values) > WIDTH for values in inside):
                raise ValueError(
                    f"the request has a list or an object of more than {WIDTH:,} items"
                )
            level = [value for values in inside for value in values]
        if any(isinstance(item, dict | list) for item in level):
            raise ValueError(f"the request is nested more than {DEPTH} levels deep")
        return (
            {name: value for name, value in data.items() if value is not None}
            if isinstance(data, dict)
            else data
        )

    def turns(self, stored: Callable[[str], bytes], settings: Settings) -> list[dict[str, Any]]:
        """The messages as the processor reads them: fields that are null left out, uploaded files in their place."""
        turns = [
            {name: value for name, value in message.items() if value is not None}
            for message in self.messages
        ]
        parts = len(turns) + sum(
            len(turn["content"]) for turn in turns if isinstance(turn.get("content"), list)
        )
        if parts > settings.max_parts:
            raise PromptError(
                f"the request has {parts} messages and parts; the limit is {settings.max_parts}"
            )
        for turn in turns:
            if turn.get("role") == "developer":
                turn["role"] = "system"
            if isinstance(turn.get("content"), list):
                turn["content"] = [_part(part, stored) for part in turn["content"]]
        if (characters := sum(map(_characters, turns))) > settings.max_characters:
            raise PromptError(
                f"the request has {characters:,} characters of text; the limit is {settings.max_characters:,}"
            )
        return turns

    def options(self, settings: Settings) -> Options:
        """The options that it has by their names. Raises OptionError as they do."""
        same = set(OPTIONS) & set(type(self).model_fields)
        return Options(preset=settings.preset, **{name: getattr(self, name) for name in same})


class StreamOptions(Strict):
    """What a stream tells beside text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextFormat(Strict):
    """Answers of any form."""

    type: Literal["text"]


class JsonObject(Strict):
    """Answers that are a JSON object."""

    type: Literal["json_object"]


class Schema(Strict):
    """A JSON schema; followed exactly, whatever `strict` says."""

    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class JsonSchema(Strict):
    """Answers that are JSON of this schema."""

    type: Literal["json_schema"]
    json_schema: Schema


class Regex(Strict):
    """Answers that match a regular expression from beginning to end."""

    type: Literal["regex"]
    regex: Annotated[str, Field(min_length=1, max_length=4096)]


class Choice(Strict):
    """Answers that are one of these texts."""

    type: Literal["choice"]
    choice: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=256)
    ]


class ExplainRequest(PromptRequest):
    """POST /v1/messages/explain: messages of which the last is the answer that is explained, with what it was asked with."""

    explain: How = True

    @model_validator(mode="after")
    def _answered(self) -> ExplainRequest:
        last = self.messages[-1]
        if (
            last.get("role") != "assistant"
            or not isinstance(last.get("content"), str)
            or len(self.messages) < 2
        ):
            raise ValueError(
                "messages: the last must be the assistant's answer, a text, after the question"
            )
        return self


StopString = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(PromptRequest):
    """POST /v1/chat/completions. Fields with one allowed value are OpenAI's, for what this server does not do.

    Beyond OpenAI's: top_k, min_p, repetition_penalty, explain (which image an answer leaned on: true, or "attention" for the
    cheap variant), and response_format by `regex` and `choice`. Without a temperature the likeliest token is taken.
    """

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = []
    logit_bias: Annotated[
        dict[
            Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]
        ],
        Field(max_length=1024),
    ] = {}
    explain: bool | Literal["attention"] = False
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: Annotated[str, Field(max_length=128)] | None = None
    safety_identifier: Annotated[str, Field(max_length=128)] | None = None
    response_format: Annotated[
        TextFormat | JsonObject | JsonSchema | Regex | Choice, Field(discriminator="type")
    ] = TextFormat(type="text")
    modalities: list[Literal["text"]] = ["text"]
    service_tier: Literal["auto", "default"] = "auto"
    store: Literal[False] = False
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "none"

    def options(self, settings: Settings) -> Options:
        """All options. Raises OptionError where fields contradict each other or are over the server's limits."""
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise OptionError(
                f"max_tokens is {both[0]} and max_completion_tokens {both[1]}: they mean the same, give one"
            )
        most = both[0] or both[1]
        if most is not None and most > settings.max_tokens:
            raise OptionError(
                f"max_completion_tokens is {most}; this server writes at most {settings.max_tokens} tokens"
            )
        if self.n > settings.max_choices:
            raise OptionError(
                f"n is {self.n}; this server gives at most {settings.max_choices} answers to a request"
            )
        if self.n > 1 and self.seed is not None and self.seed + self.n > 2**63:
            raise OptionError(
                f"answer i of n takes seed + i, and {self.seed} + {self.n - 1} is more than a seed can be"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise OptionError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise OptionError("stream_options needs stream: true")
        return PromptRequest.options(self, settings).but(
            {
                "max_new_tokens": most,
                "logit_bias": {int(token): bias for token, bias in self.logit_bias.items()},
                "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            }
        )


def adapter_of(asked: str | None, name: str, adapters: Sequence[str]) -> str | None:
    """The adapter that a request's model stands for; None is the model served. Raises Refusal for one that is not here."""
    if asked in (None, name):
        return None
    if asked not in adapters:
        here = ", ".join(map(repr, (name, *adapters)))
        raise ApiError(
            404,
            "model_not_found",
            f"there is no model {asked[:200]!r} here; this server has {here}",
            param="model",
        )
    return asked


def _part(part: Any, stored: Callable[[str], bytes]) -> Any:
    """A part with the bytes of uploaded files in the place of their ids; its form is checked by `processing.chat`."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "file":
        file = part.get("file")
        if set(part) != {"type", "file"} or not isinstance(file, dict) or set(file) != {"file_id"}:
            raise PromptError(
                "a file part is {'type': 'file', 'file': {'file_id': 'file-...'}}, its file uploaded to /v1/files"
            )
        data = stored(str(file["file_id"]))
        kind = "video" if is_video(data[:512]) else "image"
        return {"type": kind, kind: data}
    for source in _sources(part):
        if not isinstance(source, str | None):
            raise PromptError(
                f"an image or a video is named by a text, not by something of type {type(source).__name__}"
            )
    return {
        name: _filled(value, stored) if name in SOURCES else value for name, value in part.items()
    }


def _sources(part: dict[str, Any]) -> Iterator[Any]:
    """What a part names that `processing.chat` takes as it is, for callers that have pictures in memory."""
    video, views = part.get("video"), part.get("views")
    yield part.get("image")
    yield from video if isinstance(video, list) else [video]
    if isinstance(views, dict):
        yield from views.values()
    elif isinstance(views, list):
        yield from (view.get("image") if isinstance(view, dict) else view for view in views)


def _filled(value: Any, stored: Callable[[str], bytes]) -> Any:
    if isinstance(value, str):
        return stored(value) if FILE_ID.fullmatch(value) else value
    if isinstance(value, list):
        return [_filled(item, stored) for item in value]
    return (
        {name: _filled(item, stored) for name, item in value.items()}
        if isinstance(value, dict)
        else value
    )


def _characters(value: Any, text: bool = True) -> int:
    """Characters that are to be tokenised, names of views among them; addresses and data of media are not."""
    if isinstance(value, dict):
        return sum(
            len(n) + _characters(v, n in ("text", "name") or (text and n not in MEDIA))
            for n, v in value.items()
        )
    if isinstance(value, list):
        return sum(_characters(item, text) for item in value)
    return len(value) if text and isinstance(value, str) else 0
