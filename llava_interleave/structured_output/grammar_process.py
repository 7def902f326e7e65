"""A process that compiles grammars, so that one that takes too long can be killed with it.

Run as a script. It reads lines of JSON from standard input: first the vocabulary `[tokens, eos_ids,
special_ids]`, its tokens in latin-1, then grammars. It answers each with a line, a grammar with its
error, "" for a valid one, as a JSON string. It imports nothing of this package.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import llguidance

MAX_MEMORY = 64 * 2**20
"""Bytes that a grammar may take, as the process that uses it needs them, too: a schema of 1,900
fields takes 20 MiB, a regular expression of nested repetitions 170.
"""


class Vocabulary:
    """The tokens, with llguidance's interface of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos_ids: list[int], special_ids: list[int]) -> None:
        self.tokens, self.eos_token_id, self.special_token_ids = tokens, eos_ids[0], special_ids
        self._bytes = {token: number for number, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of single bytes: good enough to compile with."""
        return [self._bytes[text[i : i + 1]] for i in range(len(text))]


def main() -> None:
    if hasattr(os, "nice"):
        os.nice(5)
    texts, eos_ids, special_ids = json.loads(sys.stdin.buffer.readline())
    tokens = [text.encode("latin-1") for text in texts]
    wrapper = llguidance.TokenizerWrapper(Vocabulary(tokens, eos_ids, special_ids))
    tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=eos_ids)
    _limit_memory()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin.buffer:
        matcher = llguidance.LLMatcher(tokenizer, json.loads(line), log_level=0)
        if not matcher.is_error():
            matcher.compute_logit_bias()
        print(json.dumps(matcher.get_error() if matcher.is_error() else ""), flush=True)


def _limit_memory() -> None:
    """End this process where it takes more than `MAX_MEMORY` from now on."""
    if sys.platform == "linux":  # macOS does not enforce it
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[5])  # of data and stack
        limit = pages * resource.getpagesize() + MAX_MEMORY
        with contextlib.suppress(ValueError):  # the process has a lower one
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
