"""Structured output (guided decoding) by llguidance: JSON, schemas, regexes, choices."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor

from ..errors import OptionError
from ..processing import Tokenizer

JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it. With free whitespace a model could write whitespace for ever."""
MAX_GRAMMAR = 64_000
"""Characters of a schema, a regular expression, or all choices."""


class GrammarMatcher:
    """The engine's `TokenConstraint` for one answer. failure: why it cannot continue, or ""."""

    def __init__(self, matcher: LLMatcher, ends: Tensor) -> None:
        self.matcher, self.ends = matcher, ends

    def allowed(self) -> Tensor:
        mask = torch.from_numpy(
            np.frombuffer(self.matcher.compute_logit_bias(), np.uint8).copy()
        ).bool()
        return self.ends if self.matcher.is_error() or not mask.any() else mask

    def take(self, token: int) -> None:
        self.matcher.consume_token(token)

    @property
    def failure(self) -> str:
        return self.matcher.get_error() if self.matcher.is_error() else ""


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ends = torch.zeros(tokenizer.size, dtype=torch.bool)
        self.ends[list(tokenizer.eos_ids)] = True
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def compile(self, response_format: dict[str, Any], n: int) -> list[GrammarMatcher]:
        """n matchers for a `response_format`.

        Raises OptionError for an invalid or unsupported one.
        """
        if (length := len(json.dumps(response_format))) > MAX_GRAMMAR:
            raise OptionError(
                f"response_format has {length:,} characters; the limit is {MAX_GRAMMAR:,}"
            )
        matcher = LLMatcher(self._vocabulary(), _grammar(response_format), log_level=0)
        if matcher.is_error():
            raise OptionError(f"response_format: {matcher.get_error()}")
        return [GrammarMatcher(matcher.deep_copy(), self.ends) for _ in range(n)]

    def _vocabulary(self) -> LLTokenizer:
        """The vocabulary in llguidance's form, made on first use."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    TokenizerWrapper(_Vocabulary(self.tokenizer)),
                    n_vocab=self.tokenizer.size,
                    eos_token=sorted(self.tokenizer.eos_ids),
                )
            return self._tokenizer


class _Vocabulary:
    """A tokenizer with llguidance's interface."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = tokenizer.encode
        self.eos_token_id = tokenizer.im_end
        self.tokens = [
            tokenizer.token_bytes(token, skip_special=False) for token in range(tokenizer.size)
        ]
        plain = [tokenizer.token_bytes(token) for token in range(tokenizer.size)]
        self.special_token_ids = [token for token, text in enumerate(plain) if not text]

    def __call__(self, text: bytes) -> list[int]:
        return self.encode(text.decode("utf-8", "replace"), special=False)


def _grammar(response_format: dict[str, Any]) -> str:
    kind = response_format["type"]
    if kind == "regex":
        return LLMatcher.grammar_from_regex(response_format["regex"])
    if kind == "choice":
        texts = (json.dumps(text, ensure_ascii=False) for text in response_format["choice"])
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
    if kind == "json_object":
        schema: dict[str, Any] = {"type": "object"}
    else:
        schema = response_format["json_schema"]["schema"]
    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
