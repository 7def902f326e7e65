"""How the next token is chosen from the logits of one request. Knows no model, batch or text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ..options import SamplingParams


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
        constraint: TokenConstraint | None = None,
    ) -> None:
        self.sampling, self.constraint = sampling, constraint
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
            if self.constraint is None
            else raw.masked_fill(~self.constraint.allowed().to(raw.device), -math.inf)
        )
        scores = self.scores(allowed)
        token = (
            sample(scores, self.generator) if self.sampling.temperature else int(scores.argmax())
        )
        self.counts[token] += 1
        if self.constraint is not None:
            self.constraint.take(token)
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
