"""Checks of a prompt and its sampling parameters before they become a request."""

from __future__ import annotations

import numpy as np

from ..config import LlavaConfig
from ..errors import ContextError, OptionError, PromptError
from ..options import SamplingParams
from ..prompt import Prompt


def check_prompt(prompt: Prompt, config: LlavaConfig) -> None:
    """Raise `PromptError` for invalid token ids, or placeholders that do not match the media."""
    if not len(prompt):
        raise PromptError("the prompt has no tokens")
    tokens = np.array(prompt.tokens, dtype=np.int64)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.text.vocab_size:
        raise PromptError(
            f"token ids must be between 0 and {config.text.vocab_size - 1}; "
            f"the prompt has {low} to {high}"
        )
    expected = [m.start + offset for m in prompt.media for offset in range(m.layout.length)]
    placeholders = np.flatnonzero(np.isin(tokens, config.placeholder_ids)).tolist()
    if placeholders != expected:
        raise PromptError(
            f"the prompt has {len(placeholders)} image placeholders, but its {len(prompt.media)} "
            f"media take {len(expected)} at the places they name"
        )


def check_sampling(sampling: SamplingParams, vocab: int) -> None:
    """Raise `OptionError` for token ids outside the vocabulary."""
    for token in sampling.logit_bias:
        if token >= vocab:
            raise OptionError(f"logit_bias names token {token}, but the vocabulary has {vocab}")


def resolve_max_new_tokens(
    sampling: SamplingParams, prompt: int, context: int, kv_tokens: int, bytes_per_token: int
) -> int:
    """The limit of an answer to a prompt of so many tokens, with memory for `kv_tokens`.

    Raises `ContextError` if the context or the KV memory is too small for it.
    """
    left = context - prompt
    fit = min(left, kv_tokens - prompt + 1)
    limit = sampling.max_new_tokens or max(1, fit)
    if limit > left:
        way_out = f"ask for at most {left}"
        if left <= 0:
            way_out = f"use {1 - left} fewer, with fewer images or frames"
        raise ContextError(
            f"the prompt has {prompt} tokens and max_new_tokens is {limit}, "
            f"but the context is {context}: {way_out}"
        )
    if limit > fit:
        raise ContextError(
            f"{prompt} tokens and {limit} more need {(prompt + limit - 1) * bytes_per_token:,} "
            f"bytes of KV memory, but there are {kv_tokens * bytes_per_token:,} ({kv_tokens} "
            "tokens): raise kv_bytes, or ask for fewer tokens, images or frames"
        )
    return limit
