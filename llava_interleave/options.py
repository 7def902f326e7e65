"""What a person can choose about an answer: one frozen record from which keywords, command-line flags and documentation come."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import OptionError

DEFAULT_SYSTEM = "default"
MAX_NEW_TOKENS = 512


def _option(default: Any, sentence: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": sentence})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an answer is made. The sampling names are transformers'; temperature 0, the default, is greedy."""

    max_new_tokens: int | None = _option(
        None, "At most this many tokens are written; without it 512, or what the context leaves."
    )
    temperature: float = _option(
        0.0, "0 takes the likeliest token every time; above 0 samples, 1 as the model means it."
    )
    top_k: int = _option(0, "Sample from the k likeliest tokens only; 0 from all.")
    top_p: float = _option(
        1.0, "Sample from the fewest tokens that together reach this probability."
    )
    min_p: float = _option(
        0.0, "Leave out tokens less likely than this share of the likeliest one."
    )
    repetition_penalty: float = _option(
        1.0, "Above 1 makes tokens of the prompt and the answer so far less likely."
    )
    presence_penalty: float = _option(
        0.0, "Taken once from the logit of each token that the answer already has."
    )
    frequency_penalty: float = _option(
        0.0, "Taken from a token's logit for every time that the answer already has it."
    )
    seed: int | None = _option(
        None, "Sampling with the same seed gives the same answer; answer i of n uses seed + i."
    )
    stop: str | tuple[str, ...] = _option(
        (), "End the answer before this text; can be given several times."
    )
    stop_ids: tuple[int, ...] = _option(
        (), "End the answer at this token id; can be given several times."
    )
    ignore_eos: bool = _option(
        False, "Go on past the end-of-turn token up to max_new_tokens, for measuring."
    )
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"help": "Added to the logits, by token id."}
    )
    logprobs: int | None = _option(
        None, "Report each token's log-probability and those of this many likeliest ones."
    )
    prompt_lookup_num_tokens: int | None = _option(
        None,
        "Guess up to this many tokens at a time where the answer repeats what was said before; 0 guesses none. Without it 8 "
        "where that changes nothing but time: on a CPU, with weights of few bits and kernels.",
    )
    n: int = _option(1, "How many answers to write.")
    adapter: str | None = _option(
        None, "Answer through this adapter; on the command line its folder or Hugging Face name."
    )
    preset: str = _option("interleave", "How messages become tokens: interleave, hf or official.")
    system: str | None = _option(
        DEFAULT_SYSTEM, "The system prompt; 'default' takes the preset's own, '' leaves it out."
    )
    anyres: bool = _option(
        False, "Cut a single image into tiles for more detail, as single images were trained."
    )
    image_token_pool: int = _option(
        1,
        "Average each square of so many features a side of an image; 2 leaves a quarter of its tokens.",
    )
    video_token_pool: int = _option(
        1,
        "The same of a video's frames, so that more of them fit; the model was trained without either.",
    )
    image_token_ratio: float = _option(
        1.0, "Keep this share of an image's tokens, those that differ most from each other."
    )
    video_token_ratio: float = _option(1.0, "The same of each frame of a video.")
    frames: int | None = _option(None, "At most this many frames of a video.")
    fps: float | None = _option(None, "Frames a second of a video, up to the number of frames.")
    start: float | None = _option(None, "Begin a video at this second.")
    end: float | None = _option(None, "End a video at this second.")
    frame_times: bool = _option(False, "Tell the model the times of a video's frames.")

    def __post_init__(self) -> None:
        for name in ("stop", "stop_ids"):
            given = getattr(self, name)
            object.__setattr__(
                self, name, (given,) if isinstance(given, str | int) else tuple(given)
            )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError(f"stop takes texts that are not empty, not {self.stop!r}")
        if type(self.n) is not int or not 1 <= self.n <= 128:
            raise OptionError(f"n is the number of answers, 1 to 128, not {self.n!r}")

    def but(self, changes: Mapping[str, object]) -> Options:
        """These options with `changes`; an unknown name is an `OptionError` that tells the nearest known one."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise unknown("option", name, names)
        return dataclasses.replace(self, **dict(changes)) if changes else self  # type: ignore[arg-type]


DEFAULTS = Options()


def unknown(kind: str, name: str, known: Iterable[str]) -> OptionError:
    """The error for a name that does not exist: it tells the nearest one that does, or all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return OptionError(
        f"unknown {kind} {name!r}; "
        + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
    )
