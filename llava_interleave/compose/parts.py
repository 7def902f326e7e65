"""A SigLIP tower and a decoder of their own, read from safetensors under the network's names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoints import Checkpoint
from ..checkpoints.layouts import network_name
from ..checkpoints.safetensors_file import FLOATS, Reader, Stored
from ..config import TextConfig, VisionConfig
from ..config_json import text_from_dict, vision_from_dict
from ..errors import CheckpointError
from ..processing.tokenizer import Tokenizer


class Decoder(Protocol):
    """A language model: its shape, its tokenizer, its tensors by the network's names."""

    @property
    def config(self) -> TextConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def tokenizer_class(self) -> str: ...
    def tokenizer(self) -> Tokenizer: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _Tensors:
    """Stored tensors by the network's names."""

    stored: dict[str, Stored]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.stored.items()}

    def tensor(self, name: str) -> Tensor:
        """In the type that it is stored in."""
        stored = self.stored[name]
        with stored.path.open("rb", buffering=0) as file:
            return Reader(file).read(stored, FLOATS[stored.dtype], torch.device("cpu"))


@dataclass(frozen=True)
class Tower(_Tensors):
    """The layers of a SigLIP tower that the network uses."""

    config: VisionConfig

    @classmethod
    def open(cls, folder: Path, layers: int | None) -> Tower:
        """From a SiglipModel or a SiglipVisionModel; layers: as `vision_from_dict`."""
        checkpoint = Checkpoint.open(folder)
        config = vision_from_dict(checkpoint.values, layers)
        stored: dict[str, Stored] = {}
        for key, tensor in checkpoint.headers.items():
            name = key.removeprefix("vision_model.")
            layer = re.match(r"encoder\.layers\.(\d+)\.", name)
            if (layer and int(layer[1]) >= config.num_layers) or name.endswith("position_ids"):
                continue
            if layer or name.startswith("embeddings."):
                stored[f"vision_tower.{name}"] = _floats(key, tensor)
        return cls(stored, config)


@dataclass(frozen=True)
class SafetensorsDecoder(_Tensors):
    """A Qwen2ForCausalLM or a LlamaForCausalLM."""

    folder: Path
    config: TextConfig
    tokenizer_class: str

    @classmethod
    def open(cls, folder: Path) -> SafetensorsDecoder:
        checkpoint = Checkpoint.open(folder)
        config = text_from_dict(checkpoint.values)
        if "embed_tokens.weight" in checkpoint.headers:
            kind = checkpoint.values.get("architectures", ["a model"])[0]
            raise CheckpointError(
                f"{folder} is {kind}, a decoder without its head: take the "
                f"{'Qwen2' if config.attention_bias else 'Llama'}ForCausalLM"
            )
        stored = {
            network_name(key): _floats(key, tensor)
            for key, tensor in checkpoint.headers.items()
            if not key.endswith("rotary_emb.inv_freq")
        }
        if config.tie_word_embeddings:
            stored.pop("lm_head.weight", None)
        qwen2 = config.attention_bias
        return cls(stored, folder, config, "Qwen2Tokenizer" if qwen2 else "PreTrainedTokenizerFast")

    @property
    def dtype(self) -> torch.dtype:
        return FLOATS[self.stored["language_model.embed_tokens.weight"].dtype]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder)


def _floats(key: str, stored: Stored) -> Stored:
    if stored.dtype not in FLOATS:
        raise CheckpointError(
            f"{key} in {stored.path} is of type {stored.dtype}; use the unquantized checkpoint"
        )
    return stored
