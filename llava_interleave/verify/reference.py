"""The network of transformers on the same prompts: an adapter by PEFT, quantized
weights as floats.
"""

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
from .candidate import LayerOutputs, record_layers


@dataclass(frozen=True, slots=True)
class Reference:
    """The network of transformers and its processor; token ids from `vocab` on have no meaning."""

    model: Any
    processor: Any
    vocab: int

    def answer(
        self, chat: Sequence[Mapping[str, Any]], tokens: int
    ) -> tuple[list[int], LayerOutputs, list[int]]:
        """Token ids of the prompt, the layers, and the greedy tokens written."""
        inputs = self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            with record_layers(
                self.model.model.multi_modal_projector, self.model.model.language_model
            ) as outputs:
                logits = self.model(**inputs).logits[0]
            written = self.model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                suppress_tokens=list(range(self.vocab, logits.shape[-1])) or None,
            )
        ids = inputs["input_ids"][0].tolist()
        pixels = {"pixels": inputs["pixel_values"]} if "pixel_values" in inputs else {}
        layers = (
            pixels
            | {name: torch.cat(parts) for name, parts in outputs.items()}
            | {"logits": logits}
        )
        return ids, layers, written[0, len(ids) :].tolist()


def library(adapter: Path | None) -> ModuleType:
    """transformers, without its messages. Raises `Unsupported` where it, or PEFT for an adapter, is
    not installed.
    """
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
    folder: Path,
    processor: Processor,
    adapter: Path | None = None,
    *,
    int8_activations: bool = False,
) -> Reference:
    """The network of a folder in float32. int8_activations: the inputs of its linears are rounded
    as in this package.
    """
    transformers = library(adapter)
    with tempfile.TemporaryDirectory() as scratch:
        readable = _readable(folder, Path(scratch) / "hub")
        model = transformers.LlavaForConditionalGeneration.from_pretrained(
            readable, dtype=torch.float32
        ).eval()
        auto_processor = transformers.AutoProcessor.from_pretrained(readable, backend="pil")
    model.generation_config.eos_token_id = (
        None  # continues past the end of the turn, as the candidate does
    )
    for linear in (
        module for module in model.modules() if int8_activations and isinstance(module, nn.Linear)
    ):
        linear.register_forward_pre_hook(lambda _, inputs: (fake_quantize_activations(inputs[0]),))
    if adapter:
        from peft import PeftModel

        PeftModel.from_pretrained(model, adapter).eval()  # adds its matrices to `model` itself
    return Reference(model, auto_processor, processor.tokenizer.size)


def _readable(folder: Path, new: Path) -> Path:
    """A folder that transformers reads: this one, or a copy for the original layout and for
    quantized weights.
    """
    if checkpoints.Checkpoint.open(folder).precision:
        _dequantize(checkpoints.load(folder, dtype=torch.float32), new, folder)
    elif "mm_projector_type" in checkpoints.read_json(folder / "config.json"):
        checkpoints.save(checkpoints.load(folder, dtype=torch.float32), new, processor_from=folder)
    else:
        return folder
    return new


def _dequantize(model: Llava, new: Path, processor_from: Path) -> None:
    """Write a quantized network with its weights dequantized to float32."""
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
    )  # the head is quantized on its own
    checkpoints.write_checkpoint(
        new, untied, tensor, processor_from=processor_from, dtype=torch.float32
    )
