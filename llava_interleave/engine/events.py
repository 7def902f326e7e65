"""What the engine tells: one event a generated token, the last with the account of the request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .request import Request

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
