"""The network of transformers on the same prompts: an adapter by PEFT, quantized
weights as floats.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..config_json import has_hub_form
from ..errors import Unsupported
from ..model import Llava
from ..processing import Processor
from ..processing.processor_files import files_for_transformers
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
        shown = [  # OneVision's are [images, crops, 3, S, S]
            inputs[key].flatten(0, -4)
            for key in ("pixel_values", "pixel_values_videos")
            if key in inputs
        ]
        pixels = {"pixels": torch.cat(shown)} if shown else {}
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
        readable = _readable(folder, Path(scratch) / "hub", processor)
        onevision = processor.config.arrangement.newline
        kind = f"Llava{'Onevision' * onevision}ForConditionalGeneration"
        model = getattr(transformers, kind).from_pretrained(readable, dtype=torch.float32).eval()
        hf_processor: Any
        if onevision:
            hf_processor = OnevisionProcessor(readable, model.config)
        else:
            hf_processor = transformers.AutoProcessor.from_pretrained(readable, backend="pil")
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
    return Reference(model, hf_processor, processor.tokenizer.size)


class OnevisionProcessor:
    """transformers' LlavaOnevisionProcessor without its video processor, which needs torchvision:
    its tokenizer, chat template and token counts; its image processor also for frames.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        from transformers import AutoTokenizer
        from transformers.models.llava_onevision import LlavaOnevisionProcessor
        from transformers.models.llava_onevision import image_processing_pil_llava_onevision as pil

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.template = checkpoints.read_json(folder / "chat_template.json")["chat_template"]
        self.images = pil.LlavaOnevisionImageProcessorPil.from_pretrained(
            folder, image_grid_pinpoints=config.image_grid_pinpoints
        )
        self.count: Any = LlavaOnevisionProcessor._get_number_of_features
        self.video: Any = LlavaOnevisionProcessor.replace_video_token
        self.video_token = "<video>"
        vision = config.vision_config
        self.image_processor = self.images
        self.num_image_tokens = (vision.image_size // vision.patch_size) ** 2
        self.vision_aspect_ratio = config.vision_aspect_ratio
        self._get_unpadded_features = MethodType(
            LlavaOnevisionProcessor._get_unpadded_features, self
        )

    def apply_chat_template(
        self, chat: Sequence[Mapping[str, Any]], **options: Any
    ) -> dict[str, Tensor]:
        """Token ids, pixel values and image sizes of a conversation."""
        text = self.tokenizer.apply_chat_template(
            chat, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        images = [
            part["image"]
            for turn in chat
            for part in turn["content"]
            if isinstance(turn["content"], list) and part["type"] == "image"
        ]
        videos = [
            part["video"]
            for turn in chat
            for part in turn["content"]
            if isinstance(turn["content"], list) and part["type"] == "video"
        ]
        features: dict[str, Tensor] = {}
        if images:
            features = dict(self.images(images=[images], return_tensors="pt"))
        size = self.images.size["height"]
        first, *rest = text.split("<image>")
        for index, piece in enumerate(rest):
            height, width = map(int, features["image_sizes"][index])
            if len(images) == 1:
                number = self.count(self, height, width, size, size)
            else:
                number = self.num_image_tokens + 1
            first += "<image>" * number + piece
        if videos:
            # Of images that are not nested each is tiled, and the first crop is squashed.
            squashed = [self.images(images=frames, return_tensors="pt") for frames in videos]
            features["pixel_values_videos"] = torch.stack(
                [one["pixel_values"][:, 0] for one in squashed]
            )
            head, *tail = first.split(self.video_token)
            first = head
            for index, piece in enumerate(tail):
                first += self.video(self, features, index) + piece
        ids = self.tokenizer(first, return_tensors="pt", add_special_tokens=False)
        return {**ids, **features}


def _readable(folder: Path, new: Path, processor: Processor) -> Path:
    """A folder that transformers reads: this one, or a copy for the original layout and for
    quantized weights. LLaVA-Video, whose videos transformers does not have, is written as
    OneVision, whose images and texts are the same.
    """
    original = "mm_projector_type" in checkpoints.read_json(folder / "config.json")
    quantized = checkpoints.Checkpoint.open(folder).precision
    if not original and not quantized:
        return folder
    network = checkpoints.load(folder, dtype=torch.float32)
    if not has_hub_form(network.config):
        images = replace(network.config.arrangement, video_newline="end", frame_times=False)
        network.config = replace(network.config, arrangement=images)
    template = processor.template.source
    with files_for_transformers(folder, network.config, template) as files:
        if quantized:
            _dequantize(network, new, files)
        else:
            checkpoints.save(network, new, processor_from=files)
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
