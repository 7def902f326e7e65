"""Detects an answer that repeats itself forever.

Greedy decoding can fall into a loop that it does not leave: each repetition of a phrase makes the
next one more probable (Holtzman et al., 2020; Xu et al., "Learning to Break the Loop", 2022). vLLM
has the same stop condition (pull request 35451: finish reason "repetition"), off by default, with
its numbers left to the user. Here it is on, so it has to leave correct answers alone: 256 tokens in
a row are far more than the longest repetition in tables, lists, code or a hundred equal short
lines.
"""

from __future__ import annotations

from collections.abc import Sequence

LOOP_TOKENS = 256
"""The last so many generated tokens have to be a repetition, so at least 8 times the same span."""

MAX_PERIOD = 32
"""Tokens of the repeated span at most."""


def ends_in_loop(tokens: Sequence[int], start: int) -> bool:
    """Whether the last `LOOP_TOKENS` of `tokens[start:]` repeat a span of 1 to `MAX_PERIOD`
    tokens.
    """
    if len(tokens) - start < LOOP_TOKENS:
        return False
    window = tokens[-LOOP_TOKENS:]
    return any(
        window[-1 - period] == window[-1] and window[period:] == window[:-period]
        for period in range(1, MAX_PERIOD + 1)
    )
