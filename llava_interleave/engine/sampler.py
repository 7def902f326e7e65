"""How the next token is chosen from the logits of one request. Knows no model, batch or text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ..errors import OptionError

MAX_DRAFT_TOKENS = 15
"""Tokens that can be guessed at a time: with the one before them they are attended without a copy."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is answered; the names and the order of the steps are transformers'. Out of range: OptionError.

    The steps: logit bias, repetition penalty, presence and frequency penalty, then the most probable token (temperature 0) or
    temperature, top-k, top-p, min-p and a draw. Log probabilities are those of the network itself, before any of the steps.
    """

    max_new_tokens: int | None = field(
        default=512, metadata={"help": "most tokens to generate; None: all that fit"}
    )
    temperature: float = field(
        default=0.0, metadata={"help": "0 takes the most probable token, higher is more varied"}
    )
    top_k: int = field(
        default=0, metadata={"help": "draw only from this many most probable tokens; 0: all"}
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "draw only from the fewest tokens with this much probability together"},
    )
    min_p: float = field(
        default=0.0,
        metadata={"help": "drop tokens less probable than this share of the most probable one"},
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "above 1 disfavours tokens of the prompt and the answer"}
    )
    presence_penalty: float = field(
        default=0.0, metadata={"help": "subtracted from the logits of tokens already generated"}
    )
    frequency_penalty: float = field(
        default=0.0, metadata={"help": "subtracted once for each time a token was generated"}
    )
    seed: int | None = field(
        default=None,
        metadata={"help": "makes draws repeatable, whatever else runs; None: never the same"},
    )
    stop_ids: tuple[int, ...] = field(
        default=(), metadata={"help": "token ids that end the answer, beside end-of-text"}
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"help": "added to the logits, by token id"}
    )
    logprobs: int | None = field(
        default=None,
        metadata={"help": "report log probabilities, with so many of the likeliest, 0-20"},
    )
    ignore_eos: bool = field(
        default=False, metadata={"help": "go on after end-of-text, to measure speed"}
    )
    prompt_lookup_num_tokens: int | None = field(
        default=None,
        metadata={
            "help": "guess up to so many tokens at a time where the answer repeats what was said; 0: none; None: 8 where that "
            "changes nothing but time (quantized weights on a CPU with kernels, no adapter), else none"
        },
    )

    def __post_init__(self) -> None:
        whole, real = (int,), (int, float)
        if self.max_new_tokens is not None:
            self._within("max_new_tokens", self.max_new_tokens, whole, 1, 2**31)
        self._within("temperature", self.temperature, real, 0, 1000)
        self._within("top_k", self.top_k, whole, 0, 2**31)
        self._within("top_p", self.top_p, real, 0, 1)
        self._within("min_p", self.min_p, real, 0, 1)
        self._within("repetition_penalty", self.repetition_penalty, real, 0, 1000)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise OptionError(f"{name} must be above 0")
        self._within("presence_penalty", self.presence_penalty, real, -2, 2)
        self._within("frequency_penalty", self.frequency_penalty, real, -2, 2)
        if self.seed is not None:
            self._within("seed", self.seed, whole, -(2**63), 2**63 - 1)
        if self.prompt_lookup_num_tokens is not None:
            self._within(
                "prompt_lookup_num_tokens",
                self.prompt_lookup_num_tokens,
                whole,
                0,
                MAX_DRAFT_TOKENS,
            )
        for token in self.stop_ids:
            self._within("a token id in stop_ids", token, whole, 0, 2**31)
        for token, bias in self.logit_bias.items():
            self._within("a token id in logit_bias", token, whole, 0, 2**31)
            self._within("a value in logit_bias", bias, real, -1000, 1000)
        if self.logprobs is not None:
            self._within("logprobs", self.logprobs, whole, 0, 20)
        if not isinstance(self.ignore_eos, bool):
            raise OptionError(f"ignore_eos must be true or false, not {self.ignore_eos!r}")

    @staticmethod
    def _within(name: str, value: object, types: tuple[type, ...], low: float, high: float) -> None:
        kind = "a whole number" if types == (int,) else "a number"
        if isinstance(value, bool) or not isinstance(value, types):
            raise OptionError(f"{name} must be {kind}, not {value!r}")
        if not low <= value <= high:  # type: ignore[operator]  # a NaN is outside too
            raise OptionError(f"{name} must be between {low} and {high}, not {value!r}")

    @property
    def plain(self) -> bool:
        """Whether the answer is the bare most probable token, so that whole batches need one argmax."""
        return not (
            self.temperature or self.penalised or self.logit_bias or self.logprobs is not None
        )

    @property
    def penalised(self) -> bool:
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


class Pick(NamedTuple):
    """A chosen token; the log probabilities as `Sampling.logprobs` asked, likeliest first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenConstraint(Protocol):
    """Says which tokens may come next, for one answer whose form is given. Nothing that it does may raise."""

    def allowed(self) -> Tensor:
        """One bool a token, `[size]`, on the CPU; asked once before each token. At least one is True."""
        ...

    def take(self, token: int) -> None:
        """The token that was chosen."""
        ...


class Sampler:
    """Chooses the tokens of one request: its random numbers and its counts of tokens depend on nothing else."""

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Sequence[int],
        size: int,
        device: torch.device,
        guide: TokenConstraint | None = None,
    ) -> None:
        self.sampling, self.guide = sampling, guide
        self.generator = torch.Generator()  # on the CPU: the same numbers on every device
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.prompt = [token for token in set(prompt) if token < size]
        self.counts: Counter[int] = Counter()  # of generated tokens
        self.device = device

    def pick(self, logits: Tensor) -> Pick:
        """The next token from logits `[size]`; what must never be chosen is -inf in them."""
        raw = logits.float()
        allowed = (
            raw
            if self.guide is None
            else raw.masked_fill(~self.guide.allowed().to(raw.device), -math.inf)
        )
        scores = self.scores(allowed)
        token = (
            sample(scores, self.generator) if self.sampling.temperature else int(scores.argmax())
        )
        self.counts[token] += 1
        if self.guide is not None:
            self.guide.take(token)
        if self.sampling.logprobs is None:
            return Pick(token)
        logs = raw.log_softmax(-1)
        top = logs.topk(min(self.sampling.logprobs, len(logs)))
        return Pick(
            token,
            float(logs[token]),
            tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
        )

    def scores(self, raw: Tensor) -> Tensor:
        """Float32 logits `[size]` after bias, penalties, temperature and cuts; what was cut is -inf."""
        s, scores = self.sampling, raw.clone()
        if s.logit_bias:
            scores[self._tensor(s.logit_bias)] += self._tensor(s.logit_bias.values(), torch.float32)
        if s.repetition_penalty != 1:
            seen = self._tensor({*self.prompt, *self.counts})
            values = scores[seen]
            scores[seen] = torch.where(
                values < 0, values * s.repetition_penalty, values / s.repetition_penalty
            )
        if (s.presence_penalty or s.frequency_penalty) and self.counts:
            counts = self._tensor(self.counts.values(), torch.float32)
            scores[self._tensor(self.counts)] -= s.presence_penalty + s.frequency_penalty * counts
        if not s.temperature:
            return scores
        scores /= s.temperature
        if 0 < s.top_k < len(scores):
            scores = at_least(scores, scores.topk(s.top_k).values[-1])
        if s.top_p < 1:
            scores = nucleus(scores, s.top_p)
        if s.min_p:
            scores = at_least(scores, scores.max() + math.log(s.min_p))
        return scores

    def _tensor(self, values: Iterable[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self.device)


def mask_invalid_tokens(logits: Tensor, vocab: int, never: int) -> Tensor:
    """Of logits `[..., ids]` those of the ids that can be written: below `vocab`, and -inf for the one that never is."""
    logits = logits[..., :vocab]
    if never < vocab:
        logits[..., never] = -math.inf
    return logits


def at_least(scores: Tensor, limit: Tensor) -> Tensor:
    """Scores, -inf below `limit`; a `masked_fill` takes twenty times as long."""
    below = torch.nextafter(limit, torch.full_like(limit, -math.inf))
    return threshold(scores, float(below), -math.inf)


def nucleus(scores: Tensor, share: float) -> Tensor:
    """Scores `[size]`, -inf beyond the fewest likeliest tokens that hold `share` of the probability (Holtzman et al., 2020)."""
    probabilities = scores.softmax(-1)
    for count in (
        64,
        1024,
        8192,
        len(scores),
    ):  # sorting a whole vocabulary costs as much as half a decode step
        values, ids = probabilities.topk(min(count, len(scores)))
        kept = values.cumsum(-1) - values < share
        if not kept[-1]:
            break
    kept[0] = True
    ids = ids[kept]
    return torch.full_like(scores, -math.inf).index_copy(0, ids, scores[ids])


def sample(scores: Tensor, generator: torch.Generator) -> int:
    """One token from softmax(scores): the inverse of the cumulative distribution at one random number."""
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[-1:]
    at = torch.rand(1, generator=generator, dtype=torch.float64).to(total.device) * total
    index = torch.searchsorted(cumulative, at, right=True)
    last = torch.searchsorted(
        cumulative, total
    )  # rounding never reaches a token of probability 0, nor what is no number the end
    return int(torch.minimum(index, last).clamp_max(len(scores) - 1))
