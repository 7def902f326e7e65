"""Answers in a given form: JSON, a JSON schema, a regular expression, one of some texts. By llguidance, within its bounds."""

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

JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written: as Python does. Free white space would let a model write nothing else for ever."""
LONGEST = 64_000
"""Characters of a schema, a regular expression, or all choices."""


class GrammarMatcher:
    """Follows one answer; the engine's `Guide`. `failure`: why it could not go on, else ""."""

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


class Grammars:
    """Makes guides for one tokenizer. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ends = torch.zeros(tokenizer.size, dtype=torch.bool)
        self.ends[list(tokenizer.eos_ids)] = True
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    def guides(self, form: dict[str, Any], n: int) -> list[GrammarMatcher]:
        """n guides for a `response_format`. Raises OptionError for one that cannot be followed."""
        written = json.dumps(form)
        if len(written) > LONGEST:
            raise OptionError(
                f"response_format has {len(written):,} characters; the limit is {LONGEST:,}"
            )
        matcher = LLMatcher(self._tokens(), _grammar(form), log_level=0)
        if matcher.is_error():
            raise OptionError(f"response_format: {matcher.get_error()}")
        return [GrammarMatcher(matcher.deep_copy(), self.ends) for _ in range(n)]

    def _tokens(self) -> LLTokenizer:
        """The vocabulary in llguidance's form, made when it is first asked for: it takes a moment."""
        with self._lock:
            if self._vocabulary is None:
                words = TokenizerWrapper(_Words(self.tokenizer))
                self._vocabulary = LLTokenizer(
                    words, n_vocab=self.tokenizer.size, eos_token=sorted(self.tokenizer.eos_ids)
                )
            return self._vocabulary


class _Words:
    """A tokenizer as llguidance asks for one."""

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


def _grammar(form: dict[str, Any]) -> str:
    kind = form["type"]
    if kind == "regex":
        return LLMatcher.grammar_from_regex(form["regex"])
    if kind == "choice":
        texts = (json.dumps(text, ensure_ascii=False) for text in form["choice"])
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
    schema = {"type": "object"} if kind == "json_object" else form["json_schema"]["schema"]
    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON)
