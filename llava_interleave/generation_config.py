"""generation_config.json as defaults of `Options`; a setting that is not supported is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config_json import read_json
from .errors import CheckpointError, OptionError
from .options import Options

FILE = "generation_config.json"
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
SAME_NAME = ("max_new_tokens", "repetition_penalty", "prompt_lookup_num_tokens")
SAMPLED = {"temperature": 1.0, "top_k": 50}
"""Transformers' values of a file that sets do_sample and not these."""
WITHOUT_SAMPLING = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
"""Settings that have no effect without do_sample."""
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "use_cache": (True, False),
}
"""Values with which a setting changes nothing, apart from null."""
IGNORED = {
    "_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id",
    "decoder_start_token_id", "max_length", "max_time", "cache_implementation", "cache_config",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_legacy_cache", "length_penalty", "early_stopping", "generation_kwargs",
    "prefill_chunk_size", "disable_compile", "compile_config", "is_assistant", "low_memory",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size",
}  # fmt: skip
"""Settings that change no token here: of beams, of an assistant model, of outputs, of the cache.

max_length counts the prompt too; the context length is the limit here. The tokenizer reads
eos_token_id."""


def read(folder: Path, source: str | os.PathLike[str] = "auto") -> dict[str, Any]:
    """The options that a checkpoint's generation_config.json sets, by their names.

    source: "auto" is the file in the checkpoint's `folder`, "none" reads no file, any other word
    is a folder with the file or the file. Raises CheckpointError that names what is not supported.
    """
    if source == "none":
        return {}
    path = folder / FILE if source == "auto" else Path(source)
    path = path / FILE if path.is_dir() else path
    values = read_json(path, optional=source == "auto")
    if wrong := unsupported(values):
        raise CheckpointError(
            f"{path} sets {', '.join(wrong)}, which is not supported: take it out of the file, or "
            "leave the file unread with generation_config='none' (--generation-config none)"
        )
    options = defaults(values)
    try:
        Options(**options)
    except (OptionError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return options


def default_options(read: Mapping[str, Any]) -> Options:
    """The default options of a model with such a file. max_new_tokens is not among them: as a
    default it gives way to the context length.
    """
    return Options(**{name: value for name, value in read.items() if name != "max_new_tokens"})


def defaults(values: Mapping[str, Any], do_sample: bool | None = None) -> dict[str, Any]:
    """The options that the values of a file stand for; do_sample: in place of the file's."""
    given = {name: value for name, value in values.items() if value is not None}
    options = {name: given[name] for name in SAME_NAME if name in given}
    if given.get("do_sample", False) if do_sample is None else do_sample:
        options |= SAMPLED | {name: given[name] for name in SAMPLING if name in given}
    if stops := given.get("stop_strings"):
        options["stop"] = tuple(stops) if isinstance(stops, list) else (stops,)
    return options


def unsupported(values: Mapping[str, Any]) -> list[str]:
    """The settings that would change an answer and are not supported, as `name=value`."""
    known = {"do_sample", "stop_strings", *SAMPLING, *SAME_NAME, *IGNORED}
    if not values.get("do_sample"):
        known |= {*WITHOUT_SAMPLING}
    return sorted(
        f"{name}={value!r}"
        for name, value in values.items()
        if name not in known and value not in (None, [], {}, *NO_EFFECT.get(name, ()))
    )


def describe(options: Mapping[str, Any]) -> str:
    """One line, for people."""
    return ", ".join(f"{name} {value}" for name, value in options.items())
