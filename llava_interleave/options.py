"""Generation options: one frozen record; Python keywords, flags and documentation come from it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import OptionError

DEFAULT_SYSTEM = "default"
MAX_NEW_TOKENS = 512
MAX_DRAFT_TOKENS = 15
"""Draft tokens per step at most: with the token before them they are attended without a copy."""


def setting(default: Any, sentence: str, default_text: str = "") -> Any:
    """A dataclass field with its help, and where its default is computed, how: flags show both."""
    metadata = {"help": sentence} | ({"default": default_text} if default_text else {})
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the engine chooses tokens. Names and order of the steps are those of transformers.

    The steps: logit bias, repetition penalty, presence and frequency penalty, then argmax
    (temperature 0) or temperature, top-k, top-p, min-p and a random draw. Log-probabilities are the
    model's own, before any of the steps. A value out of range is an `OptionError`.
    """

    max_new_tokens: int | None = setting(
        MAX_NEW_TOKENS, "Maximum number of tokens to generate; None: as many as fit."
    )
    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy decoding.")
    top_k: int = setting(0, "Sample from the k most likely tokens; 0 is all.")
    top_p: float = setting(
        1.0, "Nucleus sampling: sample from the fewest tokens that reach this total probability."
    )
    min_p: float = setting(
        0.0, "Exclude tokens whose probability is below this fraction of the most likely token's."
    )
    repetition_penalty: float = setting(
        1.0, "Above 1 lowers the logits of tokens already in the prompt or the answer."
    )
    presence_penalty: float = setting(
        0.0, "Subtracted from the logit of every token already generated."
    )
    frequency_penalty: float = setting(
        0.0, "Subtracted from a token's logit once per previous occurrence in the answer."
    )
    seed: int | None = setting(
        None, "Random seed: the same seed gives the same answer; answer i of n uses seed + i."
    )
    stop_ids: tuple[int, ...] = setting((), "End the answer at this token id; repeatable.")
    ignore_eos: bool = setting(
        False, "Generate max_new_tokens past the end-of-turn token, for benchmarks."
    )
    stop_on_repetition: bool = setting(
        True,
        "End an answer whose last 256 tokens repeat a span of at most 32 tokens; not with "
        "ignore_eos.",
    )
    logit_bias: Mapping[int, float] = dataclasses.field(
        default_factory=dict, metadata={"help": "Added to the logits, by token id."}
    )
    logprobs: int | None = setting(
        None, "Report each token's log-probability and this many most likely alternatives."
    )
    prompt_lookup_num_tokens: int | None = setting(
        None,
        "Speculative decoding by prompt lookup: draft up to this many tokens per step; 0 is off.",
        "8 on a CPU with the int4/int8 kernels, where the output is unchanged; otherwise off",
    )

    def __post_init__(self) -> None:
        whole, real = (int,), (int, float)
        if self.max_new_tokens is not None:
            _check("max_new_tokens", self.max_new_tokens, whole, 1, 2**31)
        _check("temperature", self.temperature, real, 0, 1000)
        _check("top_k", self.top_k, whole, 0, 2**31)
        _check("top_p", self.top_p, real, 0, 1)
        _check("min_p", self.min_p, real, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, real, 0, 1000)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise OptionError(f"{name} must be above 0")
        _check("presence_penalty", self.presence_penalty, real, -2, 2)
        _check("frequency_penalty", self.frequency_penalty, real, -2, 2)
        if self.seed is not None:
            _check("seed", self.seed, whole, -(2**63), 2**63 - 1)
        if self.prompt_lookup_num_tokens is not None:
            value = self.prompt_lookup_num_tokens
            _check("prompt_lookup_num_tokens", value, whole, 0, MAX_DRAFT_TOKENS)
        for token in self.stop_ids:
            _check("a token id in stop_ids", token, whole, 0, 2**31)
        for token, bias in self.logit_bias.items():
            _check("a token id in logit_bias", token, whole, 0, 2**31)
            _check("a value in logit_bias", bias, real, -1000, 1000)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, whole, 0, 20)
        for name in ("ignore_eos", "stop_on_repetition"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be true or false, not {getattr(self, name)!r}")

    @property
    def argmax_only(self) -> bool:
        """Whether each token is the bare argmax of the logits, which a batch computes at once."""
        return not (
            self.temperature or self.penalized or self.logit_bias or self.logprobs is not None
        )

    @property
    def penalized(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


def _check(name: str, value: object, types: tuple[type, ...], low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, types):
        kind = "a whole number" if types == (int,) else "a number"
        raise OptionError(f"{name} must be {kind}, not {value!r}")
    if not low <= value <= high:  # type: ignore[operator]  # NaN is out of range too
        raise OptionError(f"{name} must be between {low} and {high}, not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(SamplingParams):
    """Options of one answer: of its prompt and of its sampling. Temperature 0 (default) is
    greedy.
    """

    max_new_tokens: int | None = setting(
        None, "Maximum number of tokens to generate.", "512, or the rest of the context"
    )
    stop: str | tuple[str, ...] = setting(
        (), "Stop string: end the answer before this text; repeatable."
    )
    n: int = setting(1, "Number of answers.")
    orders: int = setting(
        1,
        "Ask with the images in this many orders, and give the answer that is most probable on "
        "average; for questions that do not depend on the order.",
    )
    adapter: str | None = setting(
        None, "LoRA adapter; on the command line its folder or Hugging Face name."
    )
    cite: bool = setting(
        False, "Cite the images that each sentence of the answer rests on (attribution)."
    )
    preset: str = setting("interleave", "Prompt format: interleave, hf or official.")
    system: str | None = setting(
        DEFAULT_SYSTEM, "System prompt; 'default' is the preset's own, '' omits it."
    )
    anyres: bool | None = setting(
        None,
        "Tile images (anyres) for more detail.",
        "off; on for the only image of a conversation with LLaVA-OneVision and LLaVA-Video",
    )
    image_token_pool: int = setting(
        1, "Average-pool image tokens with an N x N window; 2 keeps a quarter of them."
    )
    video_token_pool: int = setting(
        1, "As --image-token-pool, for video frames. Not used in training: check accuracy."
    )
    image_token_ratio: float = setting(
        1.0, "Keep this fraction of an image's tokens, the most diverse ones (DivPrune)."
    )
    video_token_ratio: float = setting(1.0, "As --image-token-ratio, for each video frame.")
    frames: int | None = setting(None, "Maximum number of frames sampled from a video.")
    fps: float | None = setting(None, "Frames per second sampled from a video, up to --frames.")
    start: float | None = setting(None, "Start of a video clip, in seconds.")
    end: float | None = setting(None, "End of a video clip, in seconds.")
    frame_times: bool | None = setting(
        None,
        "Write each video frame's timestamp into the prompt.",
        "off; on with LLaVA-Video",
    )

    def __post_init__(self) -> None:
        for name in ("stop", "stop_ids"):
            value = getattr(self, name)
            values = (value,) if isinstance(value, str | int) else tuple(value)
            object.__setattr__(self, name, values)
        SamplingParams.__post_init__(self)  # super() fails in a dataclass with slots
        if not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError(f"stop takes non-empty strings, not {self.stop!r}")
        if not isinstance(self.cite, bool):
            raise OptionError(f"cite must be true or false, not {self.cite!r}")
        if type(self.n) is not int or not 1 <= self.n <= 128:
            raise OptionError(f"n is the number of answers, 1 to 128, not {self.n!r}")
        if type(self.orders) is not int or not 1 <= self.orders <= 128:
            raise OptionError(f"orders is a number of orders, 1 to 128, not {self.orders!r}")
        if self.orders > 1 and (self.n > 1 or self.cite or self.temperature):
            raise OptionError(
                "orders gives one of several greedy answers: leave out n and cite, "
                "and set temperature to 0"
            )

    def but(self, changes: Mapping[str, object]) -> Options:
        """A copy with `changes`. An unknown name raises `OptionError` with the nearest known
        one.
        """
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise unknown("option", name, names)
        return dataclasses.replace(self, **dict(changes)) if changes else self  # type: ignore[arg-type]

    def sampling(self, index: int, context_left: int, limit: int = MAX_NEW_TOKENS) -> Options:
        """The sampling parameters of answer `index` of n, with `context_left` tokens for it.

        limit: of its tokens, where `max_new_tokens` is None.
        """
        limit = self.max_new_tokens or max(1, min(limit, context_left))
        seed = None if self.seed is None else self.seed + index
        return dataclasses.replace(self, max_new_tokens=limit, seed=seed)


DEFAULTS = Options()


def unknown(kind: str, name: str, known: Iterable[str]) -> OptionError:
    """The error for an unknown name; it suggests the nearest known one, or lists all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return OptionError(
        f"unknown {kind} {name!r}; "
        + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
    )
