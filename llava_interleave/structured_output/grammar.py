"""Structured output (guided decoding) by llguidance: JSON, schemas, regexes, choices.

A grammar is compiled in a process of its own first, which is killed where it takes too long, and a
matcher fails once its masks take too long: one request cannot hold up the engine's thread.
"""

from __future__ import annotations

import hashlib
import json
import selectors
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
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
COMPILE_TIMEOUT = 3.0
"""Seconds for compiling a grammar with its first mask."""
START_TIMEOUT = 60.0
"""Seconds for the compiling process to start."""
MASK_SECONDS, MASK_SECONDS_PER_TOKEN = 0.25, 0.002
"""Seconds of the engine's thread for the masks of an answer, and more for each token."""
MAX_KNOWN = 256
"""Grammars that are remembered as valid."""
MAX_INTEGER = 2**63
"""llguidance's integers have 64 bits."""


class GrammarMatcher:
    """The engine's `TokenConstraint` for one answer. failure: why it cannot continue, or ""."""

    def __init__(self, matcher: LLMatcher, ends: Tensor) -> None:
        self.matcher, self.ends = matcher, ends
        self.seconds, self.tokens = 0.0, 0
        self._slow = False

    def allowed(self) -> Tensor:
        if self._slow or self.matcher.is_error():
            return self.ends
        start = time.perf_counter()
        bias = self.matcher.compute_logit_bias()
        self.seconds += time.perf_counter() - start
        self._slow = self.seconds > MASK_SECONDS + MASK_SECONDS_PER_TOKEN * self.tokens
        mask = torch.from_numpy(np.frombuffer(bias, np.uint8).copy()).bool()
        return self.ends if self.failure or not mask.any() else mask

    def take(self, token: int) -> None:
        self.tokens += 1
        self.matcher.consume_token(token)

    @property
    def failure(self) -> str:
        if self._slow:
            return f"its masks took {self.seconds:.1f} s for {self.tokens} tokens; simplify it"
        return _short(self.matcher.get_error()) if self.matcher.is_error() else ""


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ends = torch.zeros(tokenizer.size, dtype=torch.bool)
        self.ends[list(tokenizer.eos_ids)] = True
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._processes: list[_CompileProcess] = []  # idle ones
        self._valid: OrderedDict[bytes, None] = OrderedDict()  # their hashes

    def compile(self, response_format: dict[str, Any], n: int) -> list[GrammarMatcher]:
        """n matchers for a `response_format`. Raises OptionError for an invalid or costly one."""
        if (length := len(json.dumps(response_format))) > MAX_GRAMMAR:
            raise OptionError(
                f"response_format has {length:,} characters; the limit is {MAX_GRAMMAR:,}"
            )
        try:
            grammar = _grammar(response_format)
        except ValueError as error:  # text that is not Unicode
            raise OptionError(f"response_format: {error}") from error
        self._validate(grammar)
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_logit_bias()  # here, and not in the engine's thread
        if matcher.is_error():
            raise OptionError(f"response_format: {_short(matcher.get_error())}")
        return [GrammarMatcher(matcher.deep_copy(), self.ends) for _ in range(n)]

    def close(self) -> None:
        """End the idle processes."""
        with self._lock:
            for process in self._processes:
                process.kill()
            self._processes.clear()

    def _validate(self, grammar: str) -> None:
        digest = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            if digest in self._valid:
                self._valid.move_to_end(digest)
                return
            process = self._processes.pop() if self._processes else None
        process = process or _CompileProcess(self.tokenizer)
        error = process.compile(grammar)
        if error is None:
            process.kill()
            raise OptionError(
                f"response_format takes more than {COMPILE_TIMEOUT:g} s or 64 MiB to compile; "
                "simplify it"
            )
        with self._lock:
            self._processes.append(process)
            if not error:
                self._valid[digest] = None
                if len(self._valid) > MAX_KNOWN:
                    self._valid.popitem(last=False)
        if error:
            raise OptionError(f"response_format: {_short(error)}")

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


class _CompileProcess:
    """A process of grammar_process.py; starting it waits until it is ready."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        script = Path(__file__).with_name("grammar_process.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        words = _Vocabulary(tokenizer)
        tokens = [token.decode("latin-1") for token in words.tokens]
        vocabulary = tokens, sorted(tokenizer.eos_ids), words.special_token_ids
        if self._ask(vocabulary, START_TIMEOUT) is None:
            self.kill()
            raise RuntimeError("the process that compiles grammars does not start")

    def compile(self, grammar: str) -> str | None:
        """The error of a grammar, "" for a valid one; None: too slow or too large."""
        return self._ask(grammar, COMPILE_TIMEOUT)

    def _ask(self, data: object, timeout: float) -> str | None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            try:
                self.process.stdin.write(json.dumps(data).encode() + b"\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                return None
            if not selector.select(timeout):
                return None
        line = self.process.stdout.readline()
        return str(json.loads(line)) if line else None

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


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
        _check_numbers(schema)
        schema = _closed(schema)
    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)


OPEN = {
    "additionalProperties", "allOf", "anyOf", "else", "if", "oneOf", "patternProperties",
    "propertyNames", "then", "unevaluatedProperties", "$ref",
}  # fmt: skip
"""Keywords with which an object's properties are not all in `properties`."""


def _closed(schema: Any) -> Any:
    """A schema whose objects have the properties that they name and no others.

    Models add properties without end where they may; OpenAI's strict schemas, and xgrammar unless
    it is told otherwise, do not let them either. Nothing changes below `allOf`, whose members add
    properties to each other.
    """
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for name, value in schema.items():
        if name in ("properties", "$defs", "definitions") and isinstance(value, dict):
            closed[name] = {key: _closed(item) for key, item in value.items()}
        elif name in ("items", "prefixItems", "anyOf", "oneOf", "additionalProperties"):
            closed[name] = _closed(value)
    if isinstance(schema.get("properties"), dict) and not OPEN & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _check_numbers(value: Any) -> None:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item)
    elif isinstance(value, int) and not -MAX_INTEGER <= value < MAX_INTEGER:
        raise OptionError(
            f"response_format has an integer of {value.bit_length()} bits; the limit is 64 bits"
        )


def _short(error: str) -> str:
    """llguidance's message without the dump of its state."""
    return " ".join(error.partition("\n<state>")[0].split())[:300]
