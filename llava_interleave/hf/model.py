"""The model with transformers' `generate`, run by this package's engine, without transformers."""

from __future__ import annotations

import inspect
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
        `load_in_4bit` is bitsandbytes' NF4 in every linear layer but the output head.
        FlashAttention 2 is exact attention: a GPU uses the fastest installed kernel anyway.
        """
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise OptionError(f"torch_dtype={torch_dtype} and dtype={dtype} contradict each other")
        if not low_cpu_mem_usage:
            raise OptionError(
                "low_cpu_mem_usage=False: weights are always read straight to their device; "
                "leave it out"
            )
        if quantization_config is not None:
            raise OptionError(
                "quantization_config is not read: load_in_4bit=True is NF4 with plain scales, "
                "computed in torch_dtype"
            )
        if (load_in_4bit or load_in_8bit) and not torch.cuda.is_available():
            raise Unsupported(
                f"load_in_{4 if load_in_4bit else 8}bit needs a CUDA GPU, which is not here: "
                "leave it out and pass torch_dtype=torch.bfloat16, half the memory of float32"
            )
        if load_in_8bit:
            raise Unsupported(
                "load_in_8bit, bitsandbytes' LLM.int8(), is not offered; load_in_4bit is, "
                "and int8 in load()"
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
        target_dtype = dtype if dtype is not None else torch_dtype
        if isinstance(target_dtype, str):
            target_dtype = None if target_dtype == "auto" else named_dtype(target_dtype)
        checkpoint = checkpoints.Checkpoint.open(checkpoints.resolve(name, revision))
        precision, default = ("nf4", "cuda") if load_in_4bit else (None, "cpu")
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


class LlavaOnevisionForConditionalGeneration(LlavaForConditionalGeneration):
    """The same for a checkpoint of LLaVA-OneVision."""
