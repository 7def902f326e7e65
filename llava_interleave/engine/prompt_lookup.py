"""Guesses of what an answer says next: what followed when its last tokens stood somewhere before (prompt lookup, Saxena 2023).

The network reads a token and its guesses in one step and chooses at each; what it chooses is the answer, so that a wrong guess
costs time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAMS = (3, 2)
"""How many last tokens must have stood before, the longest first."""

FIRST = 4
"""Tokens guessed at first; twice as many after a guess that was right, one more than was right after one that was not."""

DEFAULT_DRAFT_TOKENS = 8
"""Tokens guessed at a time at most, where nobody says how many."""

COST = 0.35
"""What a guessed token costs, in steps without guesses; at most, by the measurements of docs/performance.md."""

CREDIT = 4.0
"""Steps that guesses of a sequence may have cost more than they saved; then it guesses no more."""


class PromptLookupDrafter:
    """The guesses for one sequence. most: tokens at a time. never: a token that is not guessed, nor looked for."""

    def __init__(self, most: int, never: int) -> None:
        self.most, self.never = most, never
        self.length, self.credit = min(FIRST, most), CREDIT
        self._after: dict[tuple[int, ...], int] = {}  # where what followed these tokens last stands
        self._read = self._clear = 0  # tokens read, and the place after the last `never` among them

    def guess(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """What `tokens` may go on with, `most` at most; none where nothing like their end stood before."""
        if self.credit < 0 or most < 1:
            return ()
        for end in range(
            self._read, len(tokens)
        ):  # what followed the last tokens of all is not known
            for n in NGRAMS:
                if end - n >= self._clear:
                    self._after[tuple(tokens[end - n : end])] = end
            if tokens[end] == self.never:
                self._clear = end + 1
        self._read = len(tokens)
        for n in NGRAMS:
            at = self._after.get(tuple(tokens[-n:]))
            if at is not None:
                return self._on(tokens, at, min(most, self.length))
        return ()

    def _on(self, tokens: Sequence[int], at: int, most: int) -> Sequence[int]:
        """The tokens from `at` on; past the end what is guessed goes on as it began, for it may repeat itself."""
        found = list(tokens[at : at + most])
        while len(found) < most:
            found.append(found[len(found) + at - len(tokens)])
        return found[: found.index(self.never)] if self.never in found else found

    def learn(self, guessed: int, right: int) -> None:
        """How many tokens of a guess were what the network chose, before the first that was not."""
        self.length = min(self.most, 2 * self.length if right == guessed else right + 1)
        self.credit = min(CREDIT, self.credit + right - COST * guessed)
