"""The model with transformers' `generate`, run by this package's engine, without transformers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoints, generation_config, license_notice
from ..chat import kv_memory, named_dtype
from ..config_json import read_json
from ..engine import Engine, SamplingParams
from ..errors import OptionError, Unsupported
from ..model import Llava
from ..options import unknown
from ..processing import Tokenizer
from ..quantization.replace import quantized_precision
from .media import prompts
from .processor import (
    NEEDS_TRANSFORMERS,
    Light,
    device_and_dtype,
    resolve_device,
    supported_arguments,
)


class LlavaForConditionalGeneration(Light):
    """A model with transformers' `generate`, run by this package's engine."""

    def __init__(self, model: Llava, tokenizer: Tokenizer, generation: Mapping[str, Any]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.generation = dict(generation)
        self._engine: Engine | None = None

    @classmethod
    @supported_arguments
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | None = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        use_flash_attention_2: bool = False,
        low_cpu_mem_usage: bool = True,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        quantization_config: object = None,
    ) -> LlavaForConditionalGeneration:
        """The model of a checkpoint folder or a Hugging Face name; default dtype: the checkpoint's.

        Weights are always read straight to their device and dtype, as `low_cpu_mem_usage` wants.
        `load_in_4bit` is bitsandbytes' NF4 with plain scales in every linear layer but the output
        head, on a CUDA GPU; `load_in_8bit` is this package's int8, on a GPU if there is one.
        `quantization_config`: a `BitsAndBytesConfig`, or a dict of its values.
        FlashAttention 2 is exact attention: a GPU uses a kernel of that kind anyway.
        """
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise OptionError(f"torch_dtype={torch_dtype} and dtype={dtype} contradict each other")
        if not low_cpu_mem_usage:
            raise OptionError(
                "low_cpu_mem_usage=False: weights are always read straight to their device; "
                "leave it out"
            )
        target_dtype = dtype if dtype is not None else torch_dtype
        if isinstance(target_dtype, str):
            target_dtype = None if target_dtype == "auto" else named_dtype(target_dtype)
        if quantization_config is not None:
            if load_in_4bit or load_in_8bit:
                raise OptionError("give quantization_config or load_in_4bit and load_in_8bit")
            load_in_4bit, load_in_8bit, compute_dtype = _bitsandbytes(quantization_config)
            if compute_dtype is not None:
                if target_dtype not in (None, compute_dtype):
                    warnings.warn(
                        f"everything is computed in {compute_dtype}, the config's "
                        f"bnb_4bit_compute_dtype, and nothing in {target_dtype}",
                        stacklevel=2,
                    )
                target_dtype = compute_dtype
        if load_in_4bit and load_in_8bit:
            raise OptionError("load_in_4bit and load_in_8bit contradict each other")
        if load_in_4bit and not torch.cuda.is_available():
            raise Unsupported(
                "load_in_4bit needs a CUDA GPU, which is not here: leave it out and pass "
                "torch_dtype=torch.bfloat16, half the memory of float32, or pass load_in_8bit=True"
            )
        flash = use_flash_attention_2 or attn_implementation == "flash_attention_2"
        if flash:
            if not torch.cuda.is_available():
                raise Unsupported(
                    "FlashAttention 2 needs a CUDA GPU, which this machine lacks; "
                    "leave it out: attention is PyTorch's fused SDPA"
                )
        elif attn_implementation not in (None, "sdpa"):
            raise Unsupported(
                f"attn_implementation={attn_implementation!r} {NEEDS_TRANSFORMERS}; "
                "without it attention is PyTorch's SDPA"
            )
        checkpoint = checkpoints.Checkpoint.open(checkpoints.resolve(name, revision))
        precision, default = None, "cpu"
        if load_in_4bit or load_in_8bit:
            precision, default = ("nf4", "cuda") if load_in_4bit else ("int8", "auto")
        device_map = default if device_map is None else device_map
        device = resolve_device(device_map, checkpoint, precision or "auto")
        model = checkpoints.load(checkpoint, dtype=target_dtype, device=device, precision=precision)
        if flash and model.language_model.norm.weight.dtype == torch.float32:
            raise OptionError(
                "FlashAttention 2 computes in 16 bits: "
                "pass torch_dtype=torch.bfloat16 or torch.float16"
            )
        license_notice.show_once(str(name), checkpoint.folder, checkpoint.values)
        return cls(
            model,
            Tokenizer.from_folder(checkpoint.folder),
            read_json(checkpoint.folder / "generation_config.json", optional=True),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.language_model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that are not quantized."""
        return self.model.language_model.norm.weight.dtype

    def to(
        self, *args: str | int | torch.device | torch.dtype, **kwargs: Any
    ) -> LlavaForConditionalGeneration:
        """Move the model in place to a device, a dtype or both. A quantized model cannot move."""
        device, dtype = device_and_dtype(args, kwargs)
        if precision := quantized_precision(self.model):
            if (dtype or self.dtype, torch.empty(0, device=device or self.device).device) != (
                self.dtype,
                self.device,
            ):
                raise OptionError(
                    f"{precision} weights stay on {self.device} with {self.dtype}: "
                    "pass device_map and torch_dtype when you load them"
                )
            return self
        self.model.to(device=device, dtype=dtype)
        self._engine = None
        return self

    def eval(self) -> LlavaForConditionalGeneration:
        """The model itself: it is always in evaluation mode."""
        return self

    def generate(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        num_beams: int | None = None,
        **other: object,
    ) -> Tensor:
        """Ids `[B * num_return_sequences, T]`: prompts and new tokens, padded on the right.

        Defaults are the checkpoint's generation_config.json, then transformers': 20 new tokens,
        greedy; with `do_sample` temperature 1 and top_k 50. `torch.manual_seed` makes sampling
        repeatable.
        """
        if other:
            known = inspect.signature(LlavaForConditionalGeneration.generate).parameters.keys() - {
                "self",
                "other",
            }
            raise unknown("keyword of generate", next(iter(other)), known)
        if num_beams not in (None, 1) or not use_cache:
            raise Unsupported(
                f"beam search and use_cache=False {NEEDS_TRANSFORMERS}; without it leave them out"
            )
        stored = self.generation if num_beams is None else {**self.generation, "num_beams": 1}
        if wrong := generation_config.unsupported(stored):
            raise Unsupported(
                f"generation_config.json sets {', '.join(wrong)}, which {NEEDS_TRANSFORMERS}"
            )
        if do_sample is None:
            do_sample = bool(self.generation.get("do_sample"))
        defaults = generation_config.defaults(stored, do_sample)
        if stops := defaults.pop("stop", None):
            raise Unsupported(
                f"stop_strings {stops} of generation_config.json {NEEDS_TRANSFORMERS}"
            )
        if do_sample and temperature == 0:
            raise OptionError("temperature=0 is greedy; pass do_sample=False instead")
        warpers = {
            "temperature": temperature or None, "top_k": top_k, "top_p": top_p, "min_p": min_p
        }  # fmt: skip
        used: dict[str, Any] = {name: value for name, value in warpers.items() if value is not None}
        if used and not do_sample:
            raise OptionError(
                f"{next(iter(used))} does nothing without do_sample=True; "
                "leave it out or pass do_sample=True"
            )
        eos = self._eos(eos_token_id)
        given = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
        shared: dict[str, Any] = {
            "max_new_tokens": 20,
            **defaults,
            **used,
            **{name: value for name, value in given.items() if value is not None},
            "ignore_eos": True,
            "stop_ids": tuple(eos),
        }
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        media = {
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "batch_num_images": batch_num_images,
            "pixel_values_videos": pixel_values_videos,
        }
        tokens = [row[keep != 0].tolist() for row, keep in zip(input_ids, real, strict=True)]
        repeated = [
            prompt
            for prompt in prompts(tokens, media, self.model.config)
            for _ in range(num_return_sequences)
        ]
        seeds = [int(torch.randint(2**31, ())) if do_sample else None for _ in repeated]
        if self._engine is None:
            tokenizer = self.tokenizer
            self._engine = Engine(
                self.model,
                eos_ids=tokenizer.eos_ids,
                vocab=tokenizer.size,
                kv_bytes=kv_memory(self.model),
            )
        requests = self._engine.generate(
            repeated, [SamplingParams(**shared, seed=seed) for seed in seeds]
        )
        rows = [request.generated for request in requests]
        longest = max(map(len, rows))
        pad = (
            pad_token_id
            if pad_token_id is not None
            else self.generation.get("pad_token_id") or eos[0]
        )
        tails = torch.tensor(
            [row + [pad] * (longest - len(row)) for row in rows],
            dtype=input_ids.dtype,
            device=input_ids.device,
        )
        return torch.cat([input_ids.repeat_interleave(num_return_sequences, dim=0), tails], dim=1)

    def _eos(self, eos_token_id: int | Sequence[int] | None) -> list[int]:
        eos = self.generation.get("eos_token_id") if eos_token_id is None else eos_token_id
        if eos is None:
            return sorted(self.tokenizer.eos_ids)
        return [eos] if isinstance(eos, int) else list(eos)


BITSANDBYTES_IGNORED = frozenset(
    (
        *("quant_method", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type"),
        *("bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
        *("llm_int8_threshold", "llm_int8_has_fp16_weight"),
    )
)
"""Values of a `BitsAndBytesConfig` about how it stores or rounds weights: NF4 with plain scales is
at least as exact, and int8 has no outliers in 16 bits."""


def _bitsandbytes(config: object) -> tuple[bool, bool, torch.dtype | None]:
    """load_in_4bit, load_in_8bit and the dtype of the computation of a `BitsAndBytesConfig`.

    That dtype is None where it is float32, bitsandbytes' default. Raises `OptionError` for another
    config, or for values that would change which layers are quantized.
    """
    to_dict = getattr(config, "to_dict", None)
    values = dict(config if isinstance(config, Mapping) else to_dict() if to_dict else {})
    bits = {bits: bool(values.pop(f"load_in_{bits}bit", False)) for bits in (4, 8)}
    method = str(values.get("quant_method", "bitsandbytes")).removeprefix("QuantizationMethod.")
    if method.lower() not in ("bitsandbytes", "bits_and_bytes") or sum(bits.values()) != 1:
        raise OptionError(
            "quantization_config is a BitsAndBytesConfig with load_in_4bit or load_in_8bit, not "
            f"{str(config)[:200]}"
        )
    dtype = values.pop("bnb_4bit_compute_dtype", None)
    dtype = named_dtype(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    for name, value in values.items():
        if value and name not in BITSANDBYTES_IGNORED:
            raise OptionError(f"{name} of quantization_config {NEEDS_TRANSFORMERS}; leave it out")
    return bits[4], bits[8], dtype if bits[4] and dtype != torch.float32 else None


class LlavaOnevisionForConditionalGeneration(LlavaForConditionalGeneration):
    """The same for a checkpoint of LLaVA-OneVision."""
