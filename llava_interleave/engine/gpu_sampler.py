"""Samples the next tokens of a whole batch on the device; `sampler.Sampler` is the reference.

Parameters go there in one copy, tokens and log-probabilities come back while the host waits once.
Random numbers are those of each request's own generator on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import triton as kt
from .device_stream import DeviceStream, Download
from .kv_paged import aligned
from .sampler import Pick, Sampler

if TYPE_CHECKING:
    from .request import Request

NOT_FINITE = -1
"""The token of a row whose logits have a NaN: float16 overflowed."""


class GpuSampler:
    """The sampling state of all requests with penalties: how often each has which token."""

    def __init__(self, stream: DeviceStream, vocab: int) -> None:
        self.stream, self.vocab = stream, vocab
        self._state: Tensor | None = None
        self._rows: dict[Request, int] = {}

    def __call__(
        self, requests: Sequence[Request], samplers: Sequence[Sampler], raw: Tensor
    ) -> tuple[Tensor, Callable[[Sequence[int]], list[Pick]]]:
        """Tokens `[N]` int64 on the device by logits `[N, vocab]`, -inf for invalid tokens; and the
        function that makes picks of them once they are on the host."""
        masked = self._masked(requests, raw)
        scores = self._biased(requests, masked)
        tokens = kt.sample(scores, self._tensors(requests, samplers, raw.device))
        finish = self._logprobs(requests, raw, masked, tokens)
        return mark_not_finite(tokens, raw.amax(-1)), finish

    def _masked(self, requests: Sequence[Request], logits: Tensor) -> Tensor:
        """Logits, -inf for tokens that a constraint does not allow."""
        numbers = [i for i, request in enumerate(requests) if request.constraint is not None]
        if not numbers:
            return logits
        forbidden = self.stream.host(len(numbers), self.vocab, dtype=torch.bool)
        for line, number in zip(forbidden, numbers, strict=True):
            constraint = requests[number].constraint
            assert constraint is not None
            torch.logical_not(constraint.allowed(), out=line)
        rows, mask = self.stream.upload_numbers(numbers), self.stream.upload(forbidden)
        part = logits.index_select(0, rows).masked_fill_(mask, -math.inf)
        return logits.index_copy(0, rows, part)

    def _biased(self, requests: Sequence[Request], logits: Tensor) -> Tensor:
        entries = [
            (number, token, bias)
            for number, request in enumerate(requests)
            for token, bias in (request.sampling.logit_bias or {}).items()
        ]
        if not entries:
            return logits
        numbers, tokens, values = zip(*entries, strict=True)
        at = (self.stream.upload_numbers(numbers), self.stream.upload_numbers(tokens))
        bias = self.stream.upload_numbers(values, torch.float32)
        return logits.float().index_put(at, bias, accumulate=True)

    def _tensors(
        self, requests: Sequence[Request], samplers: Sequence[Sampler], device: torch.device
    ) -> kt.SamplingTensors:
        each = [request.sampling for request in requests]
        state_rows = [
            self._row(request) if request.sampling.penalized else -1 for request in requests
        ]
        columns = [
            (
                *(s.temperature, s.top_p, s.min_p, s.repetition_penalty),
                *(s.presence_penalty, s.frequency_penalty, s.top_k, row),
                sampler.uniform() if s.temperature else 0.0,
            )
            for s, sampler, row in zip(each, samplers, state_rows, strict=True)
        ]
        host = self.stream.host(9, aligned(len(each)), dtype=torch.float64)
        host[:, : len(each)] = torch.tensor(columns, dtype=torch.float64).t()
        there = self.stream.upload(host)
        floats, integers = there[:6].float()[:, : len(each)], there[6:8].int()[:, : len(each)]
        temperature, top_p, min_p, repetition, presence, frequency = floats
        top_k, rows = integers
        return kt.SamplingTensors(
            *(temperature, top_k, top_p, min_p, repetition, presence, frequency),
            there[8, : len(each)], rows, self._state,
        )  # fmt: skip

    def _row(self, request: Request) -> int:
        """The row of a request in the state, which is made of its tokens at first."""
        if request in self._rows:
            return self._rows[request]
        for old in [old for old in self._rows if old.finish_reason is not None]:
            del self._rows[old]
        row = next(n for n in range(len(self._rows) + 1) if n not in self._rows.values())
        self._rows[request] = row
        if self._state is None or row >= len(self._state):
            old_rows = 0 if self._state is None else len(self._state)
            more = torch.zeros(
                (max(4, old_rows), self.vocab), dtype=torch.int32, device=self.stream.device
            )
            self._state = more if self._state is None else torch.cat([self._state, more])
        state = self._state[row].zero_()
        seen = [token for token in set(request.prompt.tokens) if token < self.vocab]
        state[self.stream.upload_numbers(seen)] = kt.PROMPT_TOKEN
        if request.generated:
            generated = self.stream.upload_numbers(request.generated)
            state.index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
        return row

    def _logprobs(
        self, requests: Sequence[Request], raw: Tensor, masked: Tensor, tokens: Tensor
    ) -> Callable[[Sequence[int]], list[Pick]]:
        """The log-probabilities that requests want, on their way to the host."""
        rows = [i for i, request in enumerate(requests) if request.sampling.logprobs is not None]
        downloads: list[Download] = []
        if rows:
            at = self.stream.upload_numbers(rows)
            mine = raw.index_select(0, at).float()
            logprobs = mine.log_softmax(-1)
            most = max(requests[row].sampling.logprobs or 0 for row in rows)
            top = logprobs.topk(min(most, self.vocab))
            own = logprobs.gather(1, tokens.index_select(0, at)[:, None])
            allowed = masked.index_select(0, at).float().logsumexp(-1) - mine.logsumexp(-1)
            downloads = [
                self.stream.download(x)
                for x in (own[:, 0], allowed.clamp(max=0.0), top.indices, top.values)
            ]

        def finish(tokens: Sequence[int]) -> list[Pick]:
            picks = [Pick(token) for token in tokens]
            values = zip(*(download.wait().tolist() for download in downloads), strict=True)
            for row, (own, allowed, ids, tops) in zip(rows, values, strict=bool(rows)):
                count = requests[row].sampling.logprobs or 0
                pairs = tuple(zip(ids[:count], tops[:count], strict=True))
                constrained = requests[row].constraint is not None
                picks[row] = Pick(tokens[row], own, pairs, allowed if constrained else 0.0)
            for request, token in zip(requests, tokens, strict=True):
                if request.constraint is not None and token != NOT_FINITE:
                    request.constraint.take(token)
            return picks

        return finish


def mark_not_finite(tokens: Tensor, largest: Tensor) -> Tensor:
    """Tokens `[N]`, `NOT_FINITE` where the largest logit is NaN."""
    return tokens.masked_fill(largest.isnan(), NOT_FINITE)
