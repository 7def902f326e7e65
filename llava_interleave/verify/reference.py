"""What transformers makes of the same prompts: an adapter is put there by PEFT, quantized weights count as floats."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..errors import Unsupported
from ..model import Llava
from ..processing import Processor
from ..quantization.linear_cpu import QuantizedLinear
from ..quantization.packing import fake_quantize_activations
from .candidate import Stages, recorded


@dataclass(frozen=True, slots=True)
class Reference:
    """Transformers' network and its processor; a vocabulary's ids from `vocab` on have no meaning."""

    model: Any
    prepare: Any
    vocab: int

    def answer(
        self, chat: Sequence[Mapping[str, Any]], tokens: int
    ) -> tuple[list[int], Stages, list[int]]:
        """Token ids of the prompt, the stages, and the greedy tokens written."""
        inputs = self.prepare.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            with recorded(
                self.model.model.multi_modal_projector, self.model.model.language_model
            ) as seen:
                logits = self.model(**inputs).logits[0]
            written = self.model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                suppress_tokens=list(range(self.vocab, logits.shape[-1])) or None,
            )
        ids = inputs["input_ids"][0].tolist()
        pixels = {"pixels": inputs["pixel_values"]} if "pixel_values" in inputs else {}
        stages = (
            pixels | {name: torch.cat(parts) for name, parts in seen.items()} | {"logits": logits}
        )
        return ids, stages, written[0, len(ids) :].tolist()


def library(adapter: Path | None) -> ModuleType:
    """transformers, silent. Raises `Unsupported` where it, or PEFT for an adapter, is not installed."""
    name = "transformers"
    try:
        import transformers

        if adapter:
            name = "peft"
            import peft  # noqa: F401
    except ImportError as error:
        raise Unsupported(
            f"{name} is not installed; pip install 'llava-interleave[verify]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load(
    folder: Path, processor: Processor, adapter: Path | None = None, *, eight_bits: bool = False
) -> Reference:
    """Transformers' network of a folder in float32. eight_bits: inputs of its linears are rounded as those of ours are."""
    transformers = library(adapter)
    with tempfile.TemporaryDirectory() as scratch:
        readable = _readable(folder, Path(scratch) / "hub")
        model = transformers.LlavaForConditionalGeneration.from_pretrained(
            readable, dtype=torch.float32
        ).eval()
        prepare = transformers.AutoProcessor.from_pretrained(readable, backend="pil")
    model.generation_config.eos_token_id = None  # as ours, it goes on past the end of the turn
    for linear in (
        module for module in model.modules() if eight_bits and isinstance(module, nn.Linear)
    ):
        linear.register_forward_pre_hook(lambda _, given: (fake_quantize_activations(given[0]),))
    if adapter:
        from peft import PeftModel

        PeftModel.from_pretrained(
            model, adapter
        ).eval()  # puts its matrices beside the linears of `model` itself
    return Reference(model, prepare, processor.tokenizer.size)


def _readable(folder: Path, new: Path) -> Path:
    """A folder that transformers reads: this one, or for the original form and for quantized weights a copy."""
    if checkpoints.stored_precision(folder):
        _unpack(checkpoints.load(folder, dtype=torch.float32), new, folder)
    elif "mm_projector_type" in checkpoints.read_json(folder / "config.json"):
        checkpoints.save(checkpoints.load(folder, dtype=torch.float32), new, processor_from=folder)
    else:
        return folder
    return new


def _unpack(model: Llava, new: Path, processor_from: Path) -> None:
    """Write a quantized network with its weights as they count, in float32."""
    state, modules = model.state_dict(), dict(model.named_modules())

    def tensor(name: str) -> Tensor:
        module = modules[name.rpartition(".")[0]]
        return (
            module.dequantize()
            if isinstance(module, QuantizedLinear) and name.endswith(".weight")
            else state[name]
        )

    untied = replace(
        model.config, text=replace(model.config.text, tie_word_embeddings=False)
    )  # its head is a matrix of its own
    checkpoints.write_checkpoint(
        new, untied, tensor, processor_from=processor_from, dtype=torch.float32
    )
