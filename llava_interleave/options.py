"""Generation options: one frozen record; Python keywords, flags and documentation come from it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import OptionError

DEFAULT_SYSTEM = "default"
MAX_NEW_TOKENS = 512


def setting(default: Any, sentence: str, default_text: str = "") -> Any:
    """A dataclass field with its help, and where its default is computed, how: flags show both."""
    metadata = {"help": sentence} | ({"default": default_text} if default_text else {})
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of one answer. Sampling names are transformers'; temperature 0, the default, is greedy."""

    max_new_tokens: int | None = setting(
        None, "Maximum number of tokens to generate.", "512, or the rest of the context"
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
    stop: str | tuple[str, ...] = setting(
        (), "Stop string: end the answer before this text; repeatable."
    )
    stop_ids: tuple[int, ...] = setting((), "End the answer at this token id; repeatable.")
    ignore_eos: bool = setting(
        False, "Generate max_new_tokens past the end-of-turn token, for benchmarks."
    )
    logit_bias: Mapping[int, float] = field(
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
    n: int = setting(1, "Number of answers.")
    adapter: str | None = setting(
        None, "LoRA adapter; on the command line its folder or Hugging Face name."
    )
    preset: str = setting("interleave", "Prompt format: interleave, hf or official.")
    system: str | None = setting(
        DEFAULT_SYSTEM, "System prompt; 'default' is the preset's own, '' omits it."
    )
    anyres: bool = setting(
        False, "Tile a single image (anyres) for more detail, as in single-image training."
    )
    image_token_pool: int = setting(
        1, "Average-pool image tokens with an N x N window; 2 keeps a quarter of them."
    )
    video_token_pool: int = setting(
        1,
        "As --image-token-pool, for video frames. Not used in training: check accuracy.",
    )
    image_token_ratio: float = setting(
        1.0, "Keep this fraction of an image's tokens, the most diverse ones (DivPrune)."
    )
    video_token_ratio: float = setting(1.0, "As --image-token-ratio, for each video frame.")
    frames: int | None = setting(None, "Maximum number of frames sampled from a video.")
    fps: float | None = setting(None, "Frames per second sampled from a video, up to --frames.")
    start: float | None = setting(None, "Start of a video clip, in seconds.")
    end: float | None = setting(None, "End of a video clip, in seconds.")
    frame_times: bool = setting(False, "Write each video frame's timestamp into the prompt.")

    def __post_init__(self) -> None:
        for name in ("stop", "stop_ids"):
            given = getattr(self, name)
            object.__setattr__(
                self, name, (given,) if isinstance(given, str | int) else tuple(given)
            )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError(f"stop takes non-empty strings, not {self.stop!r}")
        if type(self.n) is not int or not 1 <= self.n <= 128:
            raise OptionError(f"n is the number of answers, 1 to 128, not {self.n!r}")

    def but(self, changes: Mapping[str, object]) -> Options:
        """A copy with `changes`. An unknown name raises `OptionError` with the nearest known one."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise unknown("option", name, names)
        return dataclasses.replace(self, **dict(changes)) if changes else self  # type: ignore[arg-type]


DEFAULTS = Options()


def unknown(kind: str, name: str, known: Iterable[str]) -> OptionError:
    """The error for an unknown name; it suggests the nearest known one, or lists all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return OptionError(
        f"unknown {kind} {name!r}; "
        + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
    )
