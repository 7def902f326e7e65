"""One request from `add` to its last token: plain numbers that the scheduler and the runner fill in."""

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


FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens: of the prompt, of those taken from the prefix cache, and generated (a final stop token counts).

    drafted: guessed by prompt lookup. accepted: of these, what the network chose itself.
    """

    prompt: int
    cached: int
    generated: int
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds: waiting in the `queue`; tower calls that encoded this request's media; the rest up to the first token;
    `first_token` and `total` from `add`. None: it did not come to that. `tokens_per_second` counts from the first token on.
    """

    queue: float
    vision: float
    prefill: float | None
    first_token: float | None
    total: float
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True, eq=False)
class EncoderInput:
    """The smallest piece of a media that the tower encodes and the cache keeps: a crop, or all tiles of an anyres image.

    start, stop: the tokens of the prompt that stand for it. adapter: key of the one it is encoded through, "" for none.
    """

    key: tuple[bytes, int]
    start: int
    stop: int
    pixels: Tensor
    layout: ImageTokenLayout
    adapter: str = ""


def units(media: Media, salt: bytes = b"", adapter: str = "") -> Iterator[EncoderInput]:
    """The units of a media in the order of their tokens; of a video each frame is one. Features are shared within a `salt`."""
    layout, key = media.layout, salt + media.key
    if layout.tiles is not None:
        yield EncoderInput(
            (key, -1), media.start, media.start + layout.length, media.pixels, layout, adapter
        )
        return
    one = replace(layout, crops=1)
    for crop in range(layout.crops):
        start = media.start + crop * one.length
        yield EncoderInput(
            (key, crop), start, start + one.length, media.pixels[crop : crop + 1], one, adapter
        )


@dataclass(slots=True, eq=False)
class Request:
    """A request: read it, the engine alone writes to it."""

    id: int
    prompt: Prompt = field(repr=False)
    sampling: SamplingParams
    keys: CacheKey = field(repr=False)
    max_new_tokens: int  # as resolved at `add`
    added: float
    adapter: str = ""  # key of the one that its tokens go through
    encoder: str = ""  # and its media
    salt: bytes = field(default=b"", repr=False)  # of their features
    tokens: list[int] = field(init=False, repr=False)  # prompt and answer
    units: tuple[EncoderInput, ...] = field(init=False, repr=False)
    plain: bool = field(init=False)  # as its sampling says; asked at every token
    first_unit: int = 0  # units before it are prefilled
    held_unit: int = 0  # units from first_unit up to it keep their features
    kv: SequenceKV | None = None  # while running
    sampler: Sampler | None = None
    constraint: TokenConstraint | None = field(default=None, repr=False)
    lookup: PromptLookupDrafter | None = field(default=None, repr=False)
    drafted: int = 0  # tokens guessed
    accepted: int = 0  # of them right
    cached: int | None = None
    finish_reason: FinishReason | None = None
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    vision: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt.tokens)
        self.plain = self.sampling.argmax_only
        self.units = tuple(
            unit for media in self.prompt.media for unit in units(media, self.salt, self.encoder)
        )

    @property
    def generated(self) -> list[int]:
        """The answer's token ids so far; after finish_reason "stop" the last one is the stop token."""
        return self.tokens[len(self.prompt.tokens) :]

    @property
    def most(self) -> int:
        """How many tokens' keys and values it can need at most: the last token generated is never read."""
        return len(self.prompt.tokens) + self.max_new_tokens - 1

    @property
    def usage(self) -> Usage:
        written = len(self.tokens) - len(self.prompt.tokens)
        return Usage(
            len(self.prompt.tokens), self.cached or 0, written, self.drafted, self.accepted
        )

    def timings(self, now: float) -> Timings:
        """As of the time `now`, or of its end if it has ended."""
        end, first, started = (
            now if self.ended is None else self.ended,
            self.first_token,
            self.started,
        )
        later = len(self.tokens) - len(self.prompt.tokens) - 1
        return Timings(
            queue=(end if started is None else started) - self.added,
            vision=self.vision,
            prefill=None if first is None or started is None else first - started - self.vision,
            first_token=None if first is None else first - self.added,
            total=end - self.added,
            tokens_per_second=None
            if first is None or later < 1 or end <= first
            else later / (end - first),
        )


@dataclass(frozen=True, slots=True)
class Event:
    """A generated token of a request, or its end, or both.

    token: None where a request ends without one (abort, error). With finish_reason "stop" it is the token that ended the
    answer and no part of its text. top_logprobs: (token, log probability), likeliest first. usage, timings: at the end only.
    """

    request: Request
    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    error: Exception | None = None
