"""Speculative decoding by prompt lookup (Saxena 2023): drafts the continuation of an earlier
n-gram.

The model computes a token and its draft tokens in one step and samples at each position. What it
samples is the answer, so a rejected draft token costs time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile

NGRAM_SIZES = (3, 2)
"""How many last tokens must occur earlier; the longest match is used."""

INITIAL_DRAFT_TOKENS = 4
"""Draft tokens at first; doubled after a fully accepted draft, one more than accepted otherwise."""

DEFAULT_DRAFT_TOKENS = 8
"""Draft tokens per step at most, unless the request has a number."""

DRAFT_TOKEN_COST = 0.35
"""Cost of a draft token in plain decode steps; an upper bound, measured in docs/performance.md."""

MAX_CREDIT = 4.0
"""Steps that the draft tokens of a sequence may cost more than they save before drafting ends."""


class PromptLookupDrafter:
    """Proposes draft tokens for one sequence, never a placeholder or n-grams that contain one."""

    def __init__(self, max_draft_tokens: int, placeholder_ids: Collection[int]) -> None:
        self.max_draft_tokens, self.placeholder_ids = max_draft_tokens, placeholder_ids
        self.length, self.credit = min(INITIAL_DRAFT_TOKENS, max_draft_tokens), MAX_CREDIT
        self._next: dict[tuple[int, ...], int] = {}  # index after the last occurrence of an n-gram
        self._indexed = self._text_start = 0  # tokens indexed; index after the last placeholder

    def propose(self, tokens: Sequence[int], limit: int) -> Sequence[int]:
        """At most `limit` draft tokens after `tokens`; none without an earlier match."""
        if self.credit < 0 or limit < 1:
            return ()
        for end in range(self._indexed, len(tokens)):  # the last n-gram has no continuation yet
            for n in NGRAM_SIZES:
                if end - n >= self._text_start:
                    self._next[tuple(tokens[end - n : end])] = end
            if tokens[end] in self.placeholder_ids:
                self._text_start = end + 1
        self._indexed = len(tokens)
        for n in NGRAM_SIZES:
            start = self._next.get(tuple(tokens[-n:]))
            if start is not None:
                return self._continuation(tokens, start, min(limit, self.length))
        return ()

    def _continuation(self, tokens: Sequence[int], start: int, count: int) -> Sequence[int]:
        """The tokens from `start`; past the end the draft repeats itself, as a loop would."""
        draft = list(tokens[start : start + count])
        while len(draft) < count:
            draft.append(draft[len(draft) + start - len(tokens)])
        return list(takewhile(lambda token: token not in self.placeholder_ids, draft))

    def update(self, drafted: int, accepted: int) -> None:
        """Adapt to how many tokens of a draft the model accepted."""
        longer = 2 * self.length if accepted == drafted else accepted + 1
        self.length = min(self.max_draft_tokens, longer)
        self.credit = min(MAX_CREDIT, self.credit + accepted - DRAFT_TOKEN_COST * drafted)
