"""Samples the next token of one request from its logits. Knows no model, batch or text."""

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
    """A sampled token; log-probabilities as `SamplingParams.logprobs`, most probable first.

    token: negative if the logits are not finite (on a GPU).

    allowed_logprob: of all tokens that the constraint allowed together; 0 without a constraint.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    allowed_logprob: float = 0.0


class TokenConstraint(Protocol):
    """Limits the tokens of one answer (structured output). Its methods must not raise."""

    def allowed(self) -> Tensor:
        """A mask `[vocab]`, bool, on the CPU, at least one True; read once before each token."""
        ...

    def take(self, token: int) -> None:
        """Advance by the token that was sampled."""
        ...


class Sampler:
    """Samples the tokens of one request. Its random numbers and counts depend on no other
    request.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt: Sequence[int],
        vocab: int,
        device: torch.device,
        constraint: TokenConstraint | None = None,
    ) -> None:
        self.sampling, self.constraint = sampling, constraint
        self.generator = torch.Generator()  # on the CPU: the same numbers on every device
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.prompt = [token for token in set(prompt) if token < vocab]
        self.counts: Counter[int] = Counter()  # of generated tokens
        # Apple's GPU has no float64, in which probabilities are summed
        self.device = torch.device("cpu") if device.type == "mps" else device

    def pick(self, logits: Tensor) -> Pick:
        """The next token by logits `[vocab]`, which are -inf for invalid tokens."""
        raw = logits.to(self.device, torch.float32)
        masked = raw
        if self.constraint is not None:
            masked = raw.masked_fill(~self.constraint.allowed().to(raw.device), -math.inf)
        scores = self.scores(masked)
        greedy = not self.sampling.temperature
        token = int(scores.argmax()) if greedy else sample(scores, self.generator)
        self.counts[token] += 1
        if self.constraint is not None:
            self.constraint.take(token)
        if self.sampling.logprobs is None:
            return Pick(token)
        logprobs = raw.log_softmax(-1)
        top = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        allowed = 0.0
        if self.constraint is not None:
            allowed = float((masked.logsumexp(-1) - raw.logsumexp(-1)).clamp(max=0.0))
        return Pick(token, float(logprobs[token]), tuple(pairs), allowed)

    def uniform(self) -> float:
        """The next random number, from [0, 1)."""
        return float(torch.rand(1, generator=self.generator, dtype=torch.float64))

    def scores(self, logits: Tensor) -> Tensor:
        """Logits `[vocab]`, float32, after bias, penalties, temperature and truncation (to
        -inf).
        """
        s, scores = self.sampling, logits.clone()
        if s.logit_bias:
            scores[self._tensor(s.logit_bias)] += self._tensor(s.logit_bias.values(), torch.float32)
        if s.repetition_penalty != 1:
            seen = self._tensor({*self.prompt, *self.counts})
            values, penalty = scores[seen], s.repetition_penalty
            scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
        if (s.presence_penalty or s.frequency_penalty) and self.counts:
            counts = self._tensor(self.counts.values(), torch.float32)
            scores[self._tensor(self.counts)] -= s.presence_penalty + s.frequency_penalty * counts
        if not s.temperature:
            return scores
        scores /= s.temperature
        if 0 < s.top_k < len(scores):
            scores = truncate(scores, scores.topk(s.top_k).values[-1])
        if s.top_p < 1:
            scores = nucleus(scores, s.top_p)
        if s.min_p:
            scores = truncate(scores, scores.max() + math.log(s.min_p))
        return scores

    def _tensor(self, values: Iterable[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self.device)


def mask_invalid_tokens(logits: Tensor, vocab: int, placeholder_ids: tuple[int, ...]) -> Tensor:
    """Logits `[..., vocab]` of valid ids, from `[..., ids]`; -inf for placeholders of media."""
    logits = logits[..., :vocab]
    for placeholder in placeholder_ids:
        logits[..., placeholder : placeholder + 1] = -math.inf
    return logits


def truncate(scores: Tensor, minimum: Tensor) -> Tensor:
    """Scores, -inf below `minimum`; a `masked_fill` takes twenty times as long."""
    below = torch.nextafter(minimum, torch.full_like(minimum, -math.inf))
    return threshold(scores, float(below), -math.inf)


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Scores `[vocab]`, -inf outside the smallest set of tokens with a total probability of `top_p`
    (Holtzman et al., 2020), and of those that are as probable as its last."""
    probabilities = scores.softmax(-1)
    # sorting a whole vocabulary takes as long as half a decode step
    for count in (64, 1024, 8192, len(scores)):
        values, ids = probabilities.topk(min(count, len(scores)))
        inside = values.cumsum(-1) - values < top_p
        if not inside[-1]:
            break
    inside[0] = True
    return truncate(scores, scores[ids[inside][-1]])


def sample(scores: Tensor, generator: torch.Generator) -> int:
    """One token from softmax(scores): the inverse of the cumulative distribution at a random
    number.
    """
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[-1:]
    at = torch.rand(1, generator=generator, dtype=torch.float64).to(total.device) * total
    index = torch.searchsorted(cumulative, at, right=True)
    # the bound: rounding must not reach a token of probability 0, nor NaN the end
    last = torch.searchsorted(cumulative, total)
    return int(torch.minimum(index, last).clamp_max(len(scores) - 1))
