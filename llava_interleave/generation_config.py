"""generation_config.json as defaults of `Options`; a setting that is not supported is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config_json import read_json
from .errors import CheckpointError, OptionError
from .options import SamplingParams

FILE = "generation_config.json"
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
SAME_NAME = ("max_new_tokens", "repetition_penalty", "prompt_lookup_num_tokens")
SAMPLED = {"temperature": 1.0, "top_k": 50}
"""Transformers' values of a file that sets do_sample and not these."""
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
    "use_cache": (True,),
}
"""Values with which a setting changes nothing, apart from null."""
IGNORED = {
    "_from_model_config", "transformers_version", "bos_token_id", "pad_token_id",
    "decoder_start_token_id", "max_length", "max_time", "cache_implementation", "cache_config",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_legacy_cache", "length_penalty", "early_stopping", "generation_kwargs",
    "prefill_chunk_size", "disable_compile", "compile_config", "is_assistant", "low_memory",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size",
}  # fmt: skip
"""Settings that change no token here: of beams, of an assistant model, of outputs, of the cache."""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Defaults of a checkpoint, by the names of `Options`; a value that is not given keeps its own.

    `str()` of it shows them in one line, "" without any.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path, eos_ids: frozenset[int] = frozenset()) -> GenerationDefaults:
        """The defaults of a checkpoint folder; none without a file.

        eos_ids: ids that end an answer anyway; other ids of eos_token_id become `stop_ids`. Raises
        CheckpointError that names what is not supported.
        """
        values = read_json(folder / FILE, optional=True)
        values = {name: value for name, value in values.items() if value is not None}
        options: dict[str, Any] = {n: values.pop(n) for n in SAME_NAME if n in values}
        sampled = bool(values.pop("do_sample", False))
        chosen = {name: values.pop(name) for name in SAMPLING if name in values}
        if sampled:
            options |= SAMPLED | chosen
        ends = values.pop("eos_token_id", [])
        if ids := sorted({*(ends if isinstance(ends, list) else [ends])} - eos_ids):
            options["stop_ids"] = tuple(ids)
        if stops := values.pop("stop_strings", None):
            options["stop"] = tuple(stops) if isinstance(stops, list) else (stops,)
        wrong = [
            f"{name}={value!r}"
            for name, value in values.items()
            if name not in IGNORED
            and value not in NO_EFFECT.get(name, ())
            and value not in ([], {})
        ]
        if wrong:
            raise CheckpointError(
                f"{folder / FILE} sets {', '.join(sorted(wrong))}, which is not supported; "
                "take it out of the file"
            )
        try:
            SamplingParams(**{n: v for n, v in options.items() if n != "stop"})
        except (OptionError, TypeError) as error:
            raise CheckpointError(f"{folder / FILE}: {error}") from error
        return cls(options)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.options.items())
