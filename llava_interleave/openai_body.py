"""The options in a body of OpenAI's chat completions. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import OptionError

SAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
OPTIONS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    **{name: name for name in (*SAME, "frequency_penalty", "seed", "stop")},
}
"""Names in the body, some of them vLLM's -> names of `Options`."""


def max_new_tokens(max_tokens: int | None, max_completion_tokens: int | None) -> int | None:
    """The value of OpenAI's two names. Raises `OptionError` where they differ."""
    if None not in (max_tokens, max_completion_tokens) and max_tokens != max_completion_tokens:
        raise OptionError(
            f"max_tokens is {max_tokens} and max_completion_tokens {max_completion_tokens}: "
            "they mean the same, give one"
        )
    return max_completion_tokens if max_tokens is None else max_tokens


def options(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a body; null is the default. Raises `OptionError` for wrong types."""
    max_new_tokens(body.get("max_tokens"), body.get("max_completion_tokens"))
    values = {
        OPTIONS[key]: value for key, value in body.items() if key in OPTIONS and value is not None
    }
    wrong = [key for key, v in values.items() if key != "stop" and not isinstance(v, int | float)]
    if wrong:
        raise OptionError(f"{', '.join(wrong)} must be numbers")
    if isinstance(values.get("stop"), list):
        values["stop"] = tuple(values["stop"])
    return values
