"""One request from `add` to its last token: numbers that the scheduler and the runner fill in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from ..image_layout import ImageTokenLayout
from ..options import SamplingParams
from ..prompt import Media, Prompt
from .prompt_lookup import PromptLookupDrafter
from .sampler import Sampler, TokenConstraint

if TYPE_CHECKING:
    from torch import Tensor

    from .prefix_cache import CacheKey, SequenceKV

FinishReason = Literal["stop", "length", "repetition", "prefill", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts: prompt tokens, those from the prefix cache, and generated ones with a stop
    token.

    drafted: draft tokens of prompt lookup. accepted: those that the model sampled itself.
    """

    prompt: int
    cached: int
    generated: int
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: in the `queue`; of vision encoder calls with this request's media; the rest up to
    the first token. `first_token` (TTFT) and `total` count from `add`. None: not reached.
    `tokens_per_second` counts from the first token.
    """

    queue: float
    vision: float
    prefill: float | None
    first_token: float | None
    total: float
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True, eq=False)
class EncoderInput:
    """The unit that the vision encoder computes and caches: a crop, or all tiles of an anyres
    image.

    start, stop: its tokens in the prompt. first_crop: its first one of `media`. adapter: key of the
    LoRA adapter of the encoder, or "". private: under a salt, so that it must not be kept on disk.
    """

    key: tuple[bytes, int]
    start: int
    stop: int
    media: Media
    first_crop: int
    layout: ImageTokenLayout
    adapter: str = ""
    private: bool = False

    @property
    def pixels(self) -> Tensor:
        """`[layout.crops, 3, S, S]`, normalized only now: a video's would take much memory."""
        return self.media.pixels_of(self.first_crop, self.first_crop + self.layout.crops)


def encoder_inputs(media: Media, salt: bytes = b"", adapter: str = "") -> Iterator[EncoderInput]:
    """The inputs of a media in token order, one per frame of a video. Cached within a `salt`."""
    layout, key = media.layout, salt + media.key
    if layout.tiles is not None:
        stop = media.start + layout.length
        yield EncoderInput((key, -1), media.start, stop, media, 0, layout, adapter, bool(salt))
        return
    # A newline at the end of a video belongs to its last frame.
    last = replace(layout, crops=1)
    inner = replace(last, newline="none") if layout.newline == "end" else last
    start = media.start
    for crop in range(layout.crops):
        one = last if crop == layout.crops - 1 else inner
        stop = start + one.length
        yield EncoderInput((key, crop), start, stop, media, crop, one, adapter, bool(salt))
        start += one.length


@dataclass(slots=True, eq=False)
class Request:
    """A request. Only the engine writes to it."""

    id: int
    prompt: Prompt = field(repr=False)
    sampling: SamplingParams
    cache_key: CacheKey = field(repr=False)
    max_new_tokens: int  # as resolved at `add`
    added: float
    adapter: str = ""  # key of the adapter of the decoder
    encoder_adapter: str = ""  # key of the adapter of the vision encoder
    encoder_salt: bytes = field(default=b"", repr=False)
    prefill_only: bool = False  # ends once its prompt is in the prefix cache
    client: str = ""  # clients share the engine fairly
    weight: float = 1.0  # of its client
    last_decode: int = 0  # the step that decoded it last
    tokens: list[int] = field(init=False, repr=False)  # prompt and answer
    encoder_inputs: tuple[EncoderInput, ...] = field(init=False, repr=False)
    argmax_only: bool = field(init=False)  # cached from `sampling`: read for every token
    first_input: int = 0  # encoder inputs before it are prefilled
    held_input: int = 0  # features of inputs from first_input up to it are held in the cache
    kv: SequenceKV | None = None  # while running
    sampler: Sampler | None = None
    constraint: TokenConstraint | None = field(default=None, repr=False)
    constrained: bool = False  # also where another process has the constraint
    drafter: PromptLookupDrafter | None = field(default=None, repr=False)
    drafted: int = 0
    accepted: int = 0
    cached: int | None = None
    finish_reason: FinishReason | None = None
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    encode_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt.tokens)
        self.argmax_only = self.sampling.argmax_only
        salt, adapter = self.encoder_salt, self.encoder_adapter
        self.encoder_inputs = tuple(
            one for media in self.prompt.media for one in encoder_inputs(media, salt, adapter)
        )

    @property
    def host_sampled(self) -> bool:
        """Whether a token can only be sampled once the host has seen the one before."""
        drafting = self.drafter is not None and not self.argmax_only
        return drafting or self.constrained

    @property
    def generated(self) -> list[int]:
        """The answer's token ids so far; after finish_reason "stop" with the stop token."""
        return self.tokens[len(self.prompt.tokens) :]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.prompt.tokens)

    @property
    def max_kv_tokens(self) -> int:
        """Tokens that its KV cache can grow to: the last generated one is never an input."""
        return len(self.prompt.tokens) + self.max_new_tokens - 1

    @property
    def usage(self) -> Usage:
        prompt, generated = len(self.prompt.tokens), self.num_generated
        return Usage(prompt, self.cached or 0, generated, self.drafted, self.accepted)

    def timings(self, now: float) -> Timings:
        """As of the time `now`, or of its end if it has ended."""
        end = now if self.ended is None else self.ended
        first, started = self.first_token, self.started
        prefill = speed = None
        if first is not None and started is not None:
            prefill = first - started - self.encode_seconds
        after_first = self.num_generated - 1
        if first is not None and after_first >= 1 and end > first:
            speed = after_first / (end - first)
        return Timings(
            queue=(end if started is None else started) - self.added,
            vision=self.encode_seconds,
            prefill=prefill,
            first_token=None if first is None else first - self.added,
            total=end - self.added,
            tokens_per_second=speed,
        )


@dataclass(frozen=True, slots=True)
class Event:
    """A generated token of a request, or its end, or both.

    token: None if a request ends without one (abort, error). With finish_reason "stop" it ended the
    answer and is not part of its text. top_logprobs: (token, log-probability), most probable first.
    allowed_logprob: as `Pick`. usage, timings: at the end only.
    """

    request: Request
    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    allowed_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    error: Exception | None = None
