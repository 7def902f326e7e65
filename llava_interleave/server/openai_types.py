"""Bodies of requests and responses: OpenAI's with this server's additions. /openapi.json has them.

A request field is honoured or refused by name; none is ignored.
"""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from ..errors import OptionError
from ..openai_body import max_new_tokens
from ..options import Options
from .api_errors import ApiError, ErrorResponse
from .messages import INPUT_SCHEMA, MESSAGES_SCHEMA, input_messages, resolve_messages
from .settings import Settings

AttributionMode = Literal[True, "exact", "attention"]
"""True: attention maps and leave-one-out changes. "attention": the maps alone, which is cheaper."""
MAX_DEPTH = 24
"""Levels of nesting in a request; an image in a message has six."""
MAX_ITEMS = 4096
"""Items of any list or object: validation reports all faults of a list at once."""
OPTIONS = [f.name for f in dataclasses.fields(Options) if f.name not in ("logit_bias", "logprobs")]


def _nullable(schema: dict[str, Any]) -> None:
    """null stands for a field that is left out."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            outer = {k: field.pop(k) for k in ("title", "default", "description") if k in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **outer}


class Strict(BaseModel):
    """No unknown field, no conversion; null is as good as a field left out."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_nullable
    )

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class ModelRequest(Strict):
    """A request to the model."""

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _limited(cls, data: Any) -> Any:
        """Limit lists and nesting."""
        level = [data]
        for _ in range(MAX_DEPTH):
            containers = [
                item.values() if isinstance(item, dict) else item
                for item in level
                if isinstance(item, dict | list)
            ]
            if any(len(values) > MAX_ITEMS for values in containers):
                raise ValueError(
                    f"the request has a list or an object of more than {MAX_ITEMS:,} items"
                )
            level = [value for values in containers for value in values]
        if any(isinstance(item, dict | list) for item in level):
            raise ValueError(f"the request is nested more than {MAX_DEPTH} levels deep")
        return data

    def options(self, settings: Settings, defaults: Options) -> Options:
        """`defaults` with the fields that are options. Raises OptionError."""
        shared = set(OPTIONS) & set(type(self).model_fields)
        given = {name: getattr(self, name) for name in shared}
        changes = {name: value for name, value in given.items() if value is not None}
        return defaults.but({"preset": settings.preset, **changes})


class MediaRequest(ModelRequest):
    """A request with images and videos, and their options.

    Not OpenAI's: anyres, frames, fps, start, end and frame_times, as in `llava ask`.
    """

    anyres: bool | None = None
    frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[float, Field(ge=0.001)] | None = None
    start: Annotated[float, Field(ge=0)] | None = None
    end: Annotated[float, Field(ge=0)] | None = None
    frame_times: bool | None = None

    @abstractmethod
    def turns(self, upload: Callable[[str], bytes], settings: Settings) -> list[dict[str, Any]]:
        """The messages as the processor reads them."""


class PromptRequest(MediaRequest):
    """Messages and the options of their images and videos: everything that makes a prompt."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1), WithJsonSchema(MESSAGES_SCHEMA)]

    def turns(self, upload: Callable[[str], bytes], settings: Settings) -> list[dict[str, Any]]:
        return resolve_messages(self.messages, upload, settings)


class StreamOptions(Strict):
    """Additions to a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON schema; it is enforced whatever `strict` says."""

    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    """JSON of this schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(Strict):
    """Text that matches a regular expression from beginning to end."""

    type: Literal["regex"]
    regex: Annotated[str, Field(min_length=1, max_length=4096)]


class ChoiceFormat(Strict):
    """One of these texts."""

    type: Literal["choice"]
    choice: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=256)
    ]


class AttributionRequest(PromptRequest):
    """POST /v1/messages/attribution: a question's messages, then the answer to attribute."""

    attribution: AttributionMode = True

    @model_validator(mode="after")
    def _ends_with_answer(self) -> AttributionRequest:
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


def _neutral(*values: Any, hint: str) -> Any:
    """A field of other servers or of OpenAI that may only ask for nothing: one of `values`."""

    def check(value: Any) -> Any:
        if not any(value == one and type(value) is type(one) for one in values):
            allowed = " or ".join(json.dumps(one) for one in values)
            raise ValueError(f"{json.dumps(value)[:100]} is not supported, only {allowed}: {hint}")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [*values, None]})]


NO_TOOLS = "this server has no tools; for an answer as JSON use response_format"
NO_REASONING = "the model does not reason before it answers"
NO_BEAM = "answers are sampled; use n for several"
AS_IT_IS = "the answer is text without special tokens"


class NeutralFields(ModelRequest):
    """Fields that clients send and that must not ask for anything, on every generating route."""

    store: _neutral(False, hint="nothing is stored") = None  # type: ignore[valid-type]
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: Annotated[str, Field(max_length=128)] | None = None
    safety_identifier: Annotated[str, Field(max_length=128)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    request_id: Annotated[str, Field(max_length=1024)] | None = None
    service_tier: _neutral("auto", "default", hint="there is one tier") = None  # type: ignore[valid-type]
    echo: _neutral(False, hint="the prompt is not repeated") = None  # type: ignore[valid-type]
    skip_special_tokens: _neutral(True, hint=AS_IT_IS) = None  # type: ignore[valid-type]
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: _neutral(False, hint=AS_IT_IS) = None  # type: ignore[valid-type]
    stop_token_ids: _neutral([], hint="use stop") = None  # type: ignore[valid-type]
    min_tokens: _neutral(0, hint="use logit_bias against the end token") = None  # type: ignore[valid-type]
    use_beam_search: _neutral(False, hint=NO_BEAM) = None  # type: ignore[valid-type]
    detokenize: _neutral(True, hint=AS_IT_IS) = None  # type: ignore[valid-type]
    return_token_ids: _neutral(False, hint="use logprobs") = None  # type: ignore[valid-type]
    prompt_logprobs: _neutral(0, hint="the prompt has no log-probabilities") = None  # type: ignore[valid-type]
    truncate_prompt_tokens: _neutral(-1, hint="shorten the prompt") = None  # type: ignore[valid-type]
    bad_words: _neutral([], hint="use logit_bias") = None  # type: ignore[valid-type]
    allowed_token_ids: _neutral([], hint="use structured_outputs") = None  # type: ignore[valid-type]
    cache_salt: _neutral("", hint="each API key has caches of its own") = None  # type: ignore[valid-type]
    vllm_xargs: _neutral({}, hint="there are no plugins") = None  # type: ignore[valid-type]
    no_stop_trim: _neutral(False, hint=AS_IT_IS) = None  # type: ignore[valid-type]
    prompt_cache_retention: _neutral(  # type: ignore[valid-type]
        "in_memory", "in-memory", hint="the prefix cache is in memory"
    ) = None
    rid: Annotated[str, Field(max_length=1024)] | None = None
    best_of: _neutral(1, hint=NO_BEAM) = None  # type: ignore[valid-type]
    length_penalty: _neutral(1, 1.0, hint=NO_BEAM) = None  # type: ignore[valid-type]
    priority: _neutral(0, hint="API keys share the server evenly") = None  # type: ignore[valid-type]


StopString = Annotated[str, Field(min_length=1, max_length=256)]
GUIDED = (
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object", "regex",
    "ebnf",
)  # fmt: skip
"""Fields of vLLM, and two of SGLang."""
RESPONSE_FORMATS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "json": lambda schema: {
        "type": "json_schema",
        "json_schema": {"name": "structured_outputs", "schema": schema},
    },
    "json_object": lambda _: {"type": "json_object"},
    "regex": lambda regex: {"type": "regex", "regex": regex},
    "choice": lambda choice: {"type": "choice", "choice": choice},
}
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class GenerationRequest(NeutralFields):
    """How an answer is generated.

    Not OpenAI's: top_k, min_p, repetition_penalty, ignore_eos, stop_on_repetition, and
    response_format by `regex` and `choice`. vLLM's structured_outputs and guided_* are read as
    response_format. Without temperature, top_p, top_k, min_p and repetition_penalty the model's
    generation_config counts (GET /v1/models shows it), and what it leaves open is greedy decoding.
    """

    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31), AfterValidator(lambda k: max(k, 0))] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop_on_repetition: bool = True
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)
    ] = {}
    ignore_eos: bool = False
    response_format: Annotated[
        TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat,
        Field(discriminator="type"),
    ] = TextFormat(type="text")

    @model_validator(mode="before")
    @classmethod
    def _structured(cls, data: Any) -> Any:
        """vLLM's structured_outputs and guided_* as response_format."""
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value is not None}
        form = data.get("response_format")
        if isinstance(form, dict) and form.get("type") == "json_object" and "schema" in form:
            schema = {"name": "json_object", "schema": form["schema"]}  # llama.cpp's form
            data["response_format"] = {"type": "json_schema", "json_schema": schema}
        nested = data.pop("structured_outputs", None)
        given = nested if isinstance(nested, dict) else {}
        given |= {k.removeprefix("guided_"): data.pop(k) for k in list(data) if k in GUIDED}
        data.pop("guided_decoding_backend", None)
        given = {name: value for name, value in given.items() if value not in (None, False)}
        if nested is not None and not isinstance(nested, dict):
            raise ValueError("structured_outputs must be an object")
        if not given:
            return data
        if len(given) > 1 or "response_format" in data:
            raise ValueError("several structured outputs are given; use response_format alone")
        ((name, value),) = given.items()
        if name not in RESPONSE_FORMATS:
            raise ValueError(
                f"structured output by {name} is not supported; use json, regex or choice"
            )
        if name == "json" and isinstance(value, str):
            value = json.loads(value)
        return data | {"response_format": RESPONSE_FORMATS[name](value)}

    def generation_options(
        self,
        settings: Settings,
        defaults: Options,
        *,
        max_tokens: tuple[str, int | None],
        n: int = 1,
        logprobs: int | None = None,
    ) -> Options:
        """All options. max_tokens: the name of the field, and its value.

        Raises OptionError where fields contradict each other or exceed the server's limits.
        """
        field, limit = max_tokens
        if limit is not None and limit > settings.max_tokens:
            raise OptionError(
                f"{field} is {limit}; this server's limit is {settings.max_tokens} tokens"
            )
        if n > settings.max_choices:
            raise OptionError(f"n is {n}; this server's limit is {settings.max_choices}")
        if n > 1 and self.seed is not None and self.seed + n > 2**63:
            raise OptionError(
                f"answer i of n uses seed + i, and {self.seed} + {n - 1} is above 2^63 - 1"
            )
        if self.stream_options is not None and not self.stream:
            raise OptionError("stream_options needs stream: true")
        return ModelRequest.options(self, settings, defaults).but(
            {
                "n": n,
                "max_new_tokens": limit,
                "logit_bias": {int(token): bias for token, bias in self.logit_bias.items()},
                "logprobs": logprobs,
            }
        )


class ChatRequest(PromptRequest, GenerationRequest):
    """POST /v1/chat/completions.

    Not OpenAI's: attribution (which image the answer used: true, "exact", or "attention" for the
    cheap variant), cite (annotations with the images that each sentence rests on), orders (the most
    probable answer over so many orders of the images), vLLM's continue_final_message, llama.cpp's
    return_progress, and the neutral fields of other servers.
    """

    n: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    attribution: bool | Literal["exact", "attention"] = False
    cite: bool = False
    orders: Annotated[int, Field(ge=1)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    modalities: _neutral(["text"], hint="answers are text") = None  # type: ignore[valid-type]
    tools: _neutral([], hint=NO_TOOLS) = None  # type: ignore[valid-type]
    tool_choice: _neutral("none", "auto", hint=NO_TOOLS) = None  # type: ignore[valid-type]
    functions: _neutral([], hint=NO_TOOLS) = None  # type: ignore[valid-type]
    function_call: _neutral("none", "auto", hint=NO_TOOLS) = None  # type: ignore[valid-type]
    parallel_tool_calls: bool | None = None
    reasoning_effort: _neutral("none", hint=NO_REASONING) = None  # type: ignore[valid-type]
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    documents: _neutral([], hint="put them into the messages") = None  # type: ignore[valid-type]
    chat_template: _neutral("", hint="the operator chooses it with --preset") = None  # type: ignore[valid-type]
    verbosity: _neutral("medium", hint="ask for it in the prompt") = None  # type: ignore[valid-type]
    chat_template_kwargs: _neutral(  # type: ignore[valid-type]
        {},
        {"enable_thinking": False},
        {"thinking": False},
        hint="the operator chooses the chat template with --preset",
    ) = None
    mm_processor_kwargs: _neutral({}, hint="use anyres, frames or fps") = None  # type: ignore[valid-type]
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    return_progress: bool = False

    def options(self, settings: Settings, defaults: Options) -> Options:
        """All options. Raises OptionError."""
        if self.top_logprobs is not None and not self.logprobs:
            raise OptionError("top_logprobs needs logprobs: true")
        if self.orders > settings.max_choices:
            raise OptionError(
                f"orders is {self.orders}; this server's limit is {settings.max_choices}"
            )
        if self.orders > 1 and (self.attribution or self.continue_final_message):
            raise OptionError("orders excludes attribution and continue_final_message")
        if self.return_progress and not self.stream:
            raise OptionError("return_progress needs stream: true")
        if self.add_generation_prompt is self.continue_final_message:
            raise ApiError(
                400,
                "invalid_value",
                f"add_generation_prompt is {json.dumps(self.add_generation_prompt)}: an answer is "
                "generated, or with continue_final_message: true the last message is continued",
                param="add_generation_prompt",
            )
        return self.generation_options(
            settings,
            defaults,
            max_tokens=(
                "max_completion_tokens",
                max_new_tokens(self.max_tokens, self.max_completion_tokens),
            ),
            n=self.n,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


Texts = Annotated[list[str], Field(min_length=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
NO_IMAGES = "a raw prompt has no images; send messages to /v1/chat/completions"


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: raw prompts without a chat template; control tokens in them count.

    prompt: a text, token ids, or several of them; each has n answers.
    """

    prompt: str | Texts | Tokens | Annotated[list[Tokens], Field(min_length=1)]
    n: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: _neutral("", hint="the model writes after a prompt, not into one") = None  # type: ignore[valid-type]
    images: _neutral([], hint=NO_IMAGES) = None  # type: ignore[valid-type]
    image_data: _neutral([], hint=NO_IMAGES) = None  # type: ignore[valid-type]
    multi_modal_data: _neutral({}, hint=NO_IMAGES) = None  # type: ignore[valid-type]

    def prompts(self, settings: Settings) -> list[str] | list[list[int]]:
        """One or several. Raises OptionError over the limits of `settings`."""
        several: Any = self.prompt
        if isinstance(several, str) or isinstance(several[0], int):
            several = [several]
        if (answers := len(several) * self.n) > settings.max_choices:
            raise OptionError(
                f"the request asks for {answers} answers; this server's limit is "
                f"{settings.max_choices}"
            )
        characters = sum(len(one) for one in several if isinstance(one, str))
        if characters > settings.max_characters:
            raise OptionError(
                f"the request has {characters:,} characters of text; "
                f"the limit is {settings.max_characters:,}"
            )
        return several

    def options(self, settings: Settings, defaults: Options) -> Options:
        """All options. Raises OptionError."""
        return self.generation_options(
            settings,
            defaults,
            max_tokens=("max_tokens", self.max_tokens),
            n=self.n,
            logprobs=self.logprobs,
        )


class ResponseJsonSchema(NamedSchema):
    """JSON of this schema."""

    type: Literal["json_schema"]


class ResponseText(Strict):
    """The form of the text."""

    format: (
        Annotated[TextFormat | JsonObjectFormat | ResponseJsonSchema, Field(discriminator="type")]
        | None
    ) = None
    verbosity: _neutral("medium", hint="ask for it in the input") = None  # type: ignore[valid-type]


class Reasoning(Strict):
    """What asks for no reasoning."""

    effort: _neutral("none", hint=NO_REASONING) = None  # type: ignore[valid-type]
    summary: _neutral("auto", hint=NO_REASONING) = None  # type: ignore[valid-type]


NOT_STORED = "responses are not stored; send the earlier messages in input"


class ResponsesRequest(MediaRequest, GenerationRequest):
    """POST /v1/responses. Responses are not stored: the input has the whole conversation.

    input: a text, or messages whose parts are input_text, input_image and input_file (an upload);
    also parts of chat completions. text.format is the structured output.
    """

    input: Annotated[
        str | Annotated[list[dict[str, Any]], Field(min_length=1)],
        WithJsonSchema({"anyOf": [{"type": "string"}, INPUT_SCHEMA]}),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: ResponseText | None = None
    include: Annotated[
        list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]],
        Field(max_length=16),
    ] = []
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning: Reasoning | None = None
    previous_response_id: _neutral("", hint=NOT_STORED) = None  # type: ignore[valid-type]
    conversation: _neutral("", hint=NOT_STORED) = None  # type: ignore[valid-type]
    background: _neutral(False, hint="use /v1/batches") = None  # type: ignore[valid-type]
    truncation: _neutral("disabled", hint="shorten the input") = None  # type: ignore[valid-type]
    prompt: _neutral({}, hint="there are no prompt templates; use input") = None  # type: ignore[valid-type]
    tools: _neutral([], hint=NO_TOOLS) = None  # type: ignore[valid-type]
    tool_choice: _neutral("none", "auto", hint=NO_TOOLS) = None  # type: ignore[valid-type]
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None

    @model_validator(mode="after")
    def _one_format(self) -> ResponsesRequest:
        """text.format as response_format."""
        given = self.text.format if self.text else None
        if given is None or isinstance(given, TextFormat):
            return self
        if "response_format" in self.model_fields_set:
            raise ValueError("text.format and response_format are given; use text.format alone")
        if isinstance(given, JsonObjectFormat):
            self.response_format = given
        else:
            named = NamedSchema.model_validate(given.model_dump(by_alias=True, exclude={"type"}))
            self.response_format = JsonSchemaFormat(type="json_schema", json_schema=named)
        return self

    def turns(self, upload: Callable[[str], bytes], settings: Settings) -> list[dict[str, Any]]:
        items = [{"role": "user", "content": self.input}]
        if not isinstance(self.input, str):
            items = input_messages(self.input)
        if self.instructions:
            items = [{"role": "system", "content": self.instructions}, *items]
        return resolve_messages(items, upload, settings)

    def options(self, settings: Settings, defaults: Options) -> Options:
        """All options. Raises OptionError."""
        with_logprobs = "message.output_text.logprobs" in self.include
        if self.top_logprobs and not with_logprobs:
            raise OptionError("top_logprobs needs include: ['message.output_text.logprobs']")
        return self.generation_options(
            settings,
            defaults,
            max_tokens=("max_output_tokens", self.max_output_tokens),
            logprobs=(self.top_logprobs or 0) if with_logprobs else None,
        )


class BatchRequest(Strict):
    """POST /v1/batches: requests in an uploaded file of JSON lines, answered at lowest priority."""

    input_file_id: Annotated[str, Field(max_length=128)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None


def adapter_name(model: str | None, served: str, adapters: Sequence[str]) -> str | None:
    """The adapter of a request's `model`; None for the served model, which any name stands for.

    With adapters a name has to be known: raises ApiError.
    """
    if not adapters or model in (None, "", served):
        return None
    if model not in adapters:
        raise unknown_model(str(model), served, *adapters)
    return model


def unknown_model(model: str, *served: str) -> ApiError:
    """The 404 of a model that does not exist."""
    names = ", ".join(map(repr, served))
    message = f"the model {model[:200]!r} does not exist; this server has {names}"
    return ApiError(404, "model_not_found", message, param="model")


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": ErrorResponse,
        "description": "The request is refused: the message says why, the code is for programs.",
    },
    "5XX": {
        "model": ErrorResponse,
        "description": "The server is busy (503, with Retry-After) or has failed.",
    },
}


class Status(BaseModel):
    """State of the server."""

    status: Literal["ok", "ready", "failed"]


class ModelLimits(BaseModel):
    """Limits of a request. media: images and videos. frames: of one video. pixels: of one image.

    files_bytes: uploads of an API key together.
    """

    max_tokens: int
    n: int
    body_bytes: int
    media: int
    media_bytes: int
    frames: int
    pixels: int
    files_bytes: int


class ModelCard(BaseModel):
    """A model. parent: the model that an adapter belongs to.

    tokens_per_image: of the context; max_tokens_per_image: of the only image of a conversation,
    which OneVision tiles. tokens_per_frame: of a video.

    video_frames: sampled from a video by default. generation_config: defaults of requests that the
    checkpoint's generation_config.json sets. loaded: in memory; another one is loaded by its first
    request. builtin: the toy model of the package, which knows drawn shapes only.
    """

    id: str
    parent: str | None
    context_length: int
    tokens_per_image: int
    max_tokens_per_image: int
    tokens_per_frame: int
    video_frames: int
    generation_config: dict[str, Any]
    loaded: bool = True
    builtin: bool = False


class ModelInfo(ModelCard):
    """A model as clients list it. max_model_len: the context length by vLLM's name."""

    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llava-interleave"
    max_model_len: int
    limits: ModelLimits


class ModelList(BaseModel):
    """The served model and its adapters."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class File(BaseModel):
    """An upload; its id is the hash of its content."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str


class FileList(BaseModel):
    """All uploads of an API key, oldest first."""

    object: Literal["list"] = "list"
    data: list[File]
    has_more: bool = False


class FileDeleted(BaseModel):
    """Confirms a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class TopLogprob(BaseModel):
    """A token, its natural log-probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TopLogprob):
    """A token of an answer, and the most likely tokens at its position."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprobs]
    refusal: None = None


def _optional() -> Any:
    """A field that is left out where it is None."""
    return Field(None, exclude_if=lambda value: value is None)


class ImageCitation(BaseModel):
    """The images that a sentence of the answer rests on; none: it needs no image.

    start_index, end_index: of the sentence in the text, in characters. images: numbers of images
    and videos in the order of the messages, from 1. changes: by image, the nats of log-probability
    that the sentence loses without it. uncertain: the sentence seems to count or compare.
    """

    type: Literal["image_citation"] = "image_citation"
    start_index: int
    end_index: int
    images: list[int]
    changes: list[float]
    uncertain: bool


class Message(BaseModel):
    """The answer; annotations only with `cite`."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[ImageCitation] | None = _optional()


class LiveRequest(ModelRequest):
    """POST /v1/live. When `keep` frames are there, the oldest go until `least` are left.

    frame_times: write the time of each frame before it.
    """

    keep: Annotated[int, Field(ge=2)] = 16
    least: Annotated[int, Field(ge=1)] = 8
    frame_times: bool | None = None


class Live(BaseModel):
    """A live session. expires_after: seconds without a request that end it."""

    id: str
    object: Literal["live"] = "live"
    keep: int
    least: int
    expires_after: float


class TableColumn(Strict):
    """A question about each image. choices: the only answers of a text column."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    question: Annotated[str, Field(min_length=1, max_length=10_000)]
    type: Literal["text", "int", "float", "bool"] = "text"
    choices: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=256)
    ] = []

    @model_validator(mode="after")
    def _choices_are_texts(self) -> TableColumn:
        if self.choices and self.type != "text":
            raise ValueError(f"choices are texts, but the type is {self.type}")
        return self


class ImagesRequest(ModelRequest):
    """A request about each of several images: ids of uploads, data URLs or URLs."""

    images: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class TableRequest(ImagesRequest):
    """POST /v1/images/table."""

    columns: Annotated[list[TableColumn], Field(min_length=1)]
    stream: bool = False


class FindRequest(ImagesRequest):
    """POST /v1/images/find: a yes/no question."""

    question: Annotated[str, Field(min_length=1, max_length=10_000)]


class TableCell(BaseModel):
    """An answer. probability: of the value among the allowed ones; allowed: the share of the
    model's probability on allowed values. value: None with an error."""

    value: str | int | float | bool | None
    probability: float
    allowed: float
    error: str | None = _optional()


class TableRow(BaseModel):
    """The cells of image number `index`, from 0, by column."""

    index: int
    cells: dict[str, TableCell]


class TableResult(BaseModel):
    """A row for each image, in order."""

    rows: list[TableRow]


class ImageHit(BaseModel):
    """An image by its index, and the probability of yes."""

    index: int
    probability: float
    allowed: float


class FindResult(BaseModel):
    """The most probable yes first. errors: of images by index, which are no hits."""

    hits: list[ImageHit]
    errors: dict[int, str]


class Prefill(BaseModel):
    """Tokens of a prompt that are in the prefix cache now, and those that were there before."""

    prompt_tokens: int
    cached_tokens: int


class LiveFrames(BaseModel):
    """The number of frames that questions see. prefill: None where a newer prefill of the API key
    took its place; a question then computes what is missing."""

    frames: int
    prefill: Prefill | None


class LiveDeleted(BaseModel):
    """A live session that has ended."""

    id: str
    object: Literal["live"] = "live"
    deleted: bool = True


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: Literal["repetition"] | None = _optional()


class PromptTokensDetails(BaseModel):
    """Prompt tokens from the prefix cache, and prompt tokens of images."""

    cached_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Token counts: the prompt once, the completion of all answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timings(BaseModel):
    """Seconds, of the answer that finished last. prepare: before the engine's queue."""

    prepare: float
    queue: float
    vision: float
    prefill: float | None
    first_token: float | None
    total: float
    tokens_per_second: float | None


class ImageAttributionInfo(BaseModel):
    """The library's `ImageAttribution`; a video has one map per frame."""

    name: str
    share: float | None
    change: float | None
    attention: float
    heat: list[list[list[float]]]


class SentenceAttribution(BaseModel):
    """A sentence or line of the answer. changes, shares: of each image, for its tokens alone."""

    text: str
    changes: list[float]
    shares: list[float]


class AttributionResponse(BaseModel):
    """Which image an answer used. layers: whose attention is averaged.

    logprob: of the whole answer. sentences: None where no image was left out.
    """

    layers: list[int]
    logprob: float
    images: list[ImageAttributionInfo]
    sentences: list[SentenceAttribution] | None = None


class ChoiceAttribution(AttributionResponse):
    """Attribution of answer `index`."""

    index: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a text completion's tokens; text_offset: where each begins."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the answers: answer j of n to prompt i has index i * n + j; or a delta of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: Literal["repetition"] | None = _optional()


class Completion(BaseModel):
    """Fields of a whole response and of a chunk."""

    id: str
    created: int
    model: str


class ChatCompletion(Completion):
    """All answers; `attributions` only on request."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings
    attributions: list[ChoiceAttribution] | None = _optional()


class TextCompletion(Completion):
    """All answers to raw prompts, or an event of a stream; the last one has the usage."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Timings | None = _optional()


class OutputText(BaseModel):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = []
    logprobs: list[TokenLogprobs] = []


class OutputMessage(BaseModel):
    """The answer; an item of a further request's input."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class IncompleteDetails(BaseModel):
    """Why an answer was cut off."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class InputTokensDetails(BaseModel):
    """Input tokens from the prefix cache, and input tokens of images."""

    cached_tokens: int
    image_tokens: int


class OutputTokensDetails(BaseModel):
    """The model does not reason."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class ResponseObject(BaseModel):
    """A response, with the settings in force; `output` has one message."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    background: bool = False
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    service_tier: str = "default"
    store: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str = "auto"
    tools: list[str] = []
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    timings: Timings | None = _optional()


class ResponseEvent(BaseModel):
    """An event of a streamed response; its type says which fields it has."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
    ]
    sequence_number: int
    response: ResponseObject | None = _optional()
    output_index: int | None = _optional()
    content_index: int | None = _optional()
    item_id: str | None = _optional()
    item: OutputMessage | None = _optional()
    part: OutputText | None = _optional()
    delta: str | None = _optional()
    text: str | None = _optional()
    logprobs: list[TokenLogprobs] | None = _optional()


class ResponseErrorEvent(BaseModel):
    """The event of an error that ends a streamed response."""

    type: Literal["error"] = "error"
    code: str
    message: str
    param: str | None
    sequence_number: int


class BatchCounts(BaseModel):
    """Requests of a batch."""

    total: int
    completed: int
    failed: int


class BatchError(BaseModel):
    """Why a batch failed; line: of the input file, from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(BaseModel):
    """Why a batch failed."""

    object: Literal["list"] = "list"
    data: list[BatchError]


BatchStatus = Literal["failed", "in_progress", "completed", "expired", "cancelled"]


class Batch(BaseModel):
    """A batch. Its output file has the answers, its error file the requests that failed."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelled_at: int | None = None
    request_counts: BatchCounts
    metadata: dict[str, str] | None = None


class BatchList(BaseModel):
    """Batches of an API key, newest first."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Delta(BaseModel):
    """New text of an answer; the first delta has the role, one after the text the annotations."""

    role: Literal["assistant"] | None = _optional()
    content: str | None = _optional()
    annotations: list[ImageCitation] | None = _optional()


class ChunkChoice(BaseModel):
    """A delta of answer `index`."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: Literal["repetition"] | None = _optional()


class PromptProgress(BaseModel):
    """llama.cpp's: prompt tokens in all, from the prefix cache, and prefilled so far.

    images, images_processed: the same in images and videos. waiting: requests that are queued, this
    one included; 0 once it runs.
    """

    total: int
    cache: int
    processed: int
    time_ms: int
    images: int
    images_processed: int
    waiting: int


class ChatCompletionChunk(Completion):
    """An event of a stream. The last delta has the timings; attributions and usage follow."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_progress: PromptProgress | None = _optional()
    timings: Timings | None = _optional()
    attributions: list[ChoiceAttribution] | None = _optional()


def stream_responses(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The 200 of a route that answers with `whole`, or with events."""
    return {
        200: {
            "model": whole,
            "content": {"text/event-stream": {"schema": {"type": ["string", "object"]}}},
            "description": "The answers; with `stream` server-sent events, errors as an `error` "
            "event.",
        }
    }
