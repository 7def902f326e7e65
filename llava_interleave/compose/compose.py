"""Tower + new projector + decoder -> a LLaVA checkpoint, by the rules of the published
conversion."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints import meta_network, tensor_shapes, write_checkpoint
from ..checkpoints.hub import resolve
from ..config import LlavaConfig
from ..errors import CheckpointError, OptionError
from ..processing.processor_files import processor_files
from ..processing.tokenizer import Tokenizer
from .efficientnet import EfficientNetTower
from .gguf_decoder import GgufDecoder
from .gguf_files import GgufTower
from .parts import Decoder, SafetensorsDecoder, Tower

PAD_VOCABULARY = 64
"""The vocabulary grows to a multiple of this, by at least 2, as in transformers' conversion."""
_CLASSES = "multi_modal_projector.linear_1.bias"
_EMBEDDING, _HEAD = "language_model.embed_tokens.weight", "lm_head.weight"


def compose(
    tower: str | Path,
    decoder: str | Path,
    target: str | Path,
    *,
    tower_layers: int | None = None,
    tokenizer: str | Path | None = None,
    class_names: str | Path | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> LlavaConfig:
    """Write a LLaVA checkpoint whose projector is not yet trained; -> its config.

    tower: a SiglipModel or SiglipVisionModel, a .pth file of an EfficientNet-Lite, or the mmproj
    file (.gguf) of a LLaVA, whose projector is kept. decoder: a
    Qwen2ForCausalLM (Qwen1.5, Qwen2, Qwen2.5) or a LlamaForCausalLM without biases (SmolLM2), or a
    GGUF file of one. Other than these files, all are folders or names on the Hugging Face hub.
    tower_layers: how many layers of SigLIP are used; None: all but the last.
    tokenizer: the folder of the decoder's tokenizer, for a GGUF whose own is not supported.
    class_names: a JSON list with the names of an EfficientNet-Lite's classes; the projector then
    begins as its classifier, followed by the embeddings of the names.
    dtype: None: the decoder's; bfloat16 for GGUF. seed: of the projector and of new embeddings.

    Raises `CheckpointError` for parts of another kind, and where the target is not empty.
    """
    eyes: Tower | EfficientNetTower | GgufTower
    if str(tower).endswith((".pth", ".gguf")):
        if tower_layers is not None:
            raise OptionError("tower_layers is for SigLIP in safetensors: all of a file is used")
        kind = GgufTower if str(tower).endswith(".gguf") else EfficientNetTower
        eyes = kind(Path(tower).expanduser())
    else:
        eyes = Tower.open(resolve(tower), tower_layers)
    language: Decoder
    if str(decoder).endswith(".gguf"):
        language = GgufDecoder(Path(decoder).expanduser())
    else:
        language = SafetensorsDecoder.open(resolve(decoder))
    words = language.tokenizer() if tokenizer is None else Tokenizer.from_folder(resolve(tokenizer))
    text = language.config
    old = text.vocab_size
    if words.image_id >= old + 2:
        raise CheckpointError(
            f"the tokenizer has {words.image_id} tokens and the decoder {old} embeddings: "
            "they do not belong together"
        )
    size = -(-(old + 2) // PAD_VOCABULARY) * PAD_VOCABULARY
    start: dict[str, Tensor] = {}
    if isinstance(eyes, GgufTower):
        start = eyes.projector()
        if words.image_id < old:  # the file of a LLaVA
            size = old
    if class_names is not None:
        if not isinstance(eyes, EfficientNetTower):
            raise OptionError("class_names needs a tower with a classifier, an EfficientNet-Lite")
        names = Path(class_names).expanduser()
        start = eyes.projector(names, words, language.tensor(_EMBEDDING))
    config = LlavaConfig(
        eyes.config,
        replace(text, vocab_size=size),
        words.image_id,
        projector_size=len(start[_CLASSES]) if class_names is not None else None,
    )
    expected = tensor_shapes(meta_network(config))
    _check(expected, eyes.shapes() | language.shapes(), old)
    random = torch.Generator().manual_seed(seed)
    new_rows = sample_embeddings(
        language.tensor(_EMBEDDING), size - old, 1 if text.tie_word_embeddings else 2, random
    )

    def tensor(name: str) -> Tensor:
        if name.startswith("multi_modal_projector."):
            return projector[name]
        if name.startswith("vision_tower."):
            return eyes.tensor(name)
        values = language.tensor(name)
        if name in (_EMBEDDING, _HEAD):
            values = torch.cat([values.float(), new_rows[name == _HEAD]])
        return values

    projector = start or init_projector(expected, random)
    with tempfile.TemporaryDirectory() as scratch:
        processor_files(scratch, config, words.backend, language.tokenizer_class)
        write_checkpoint(
            target,
            config,
            tensor,
            processor_from=scratch,
            dtype=dtype or language.dtype,
        )
    return config


def sample_embeddings(
    rows: Tensor, count: int, times: int, random: torch.Generator
) -> list[Tensor]:
    """`times` x `[count, D]` new embeddings from the normal distribution around the old `[V, D]`.

    Their covariance is 1e-5 times that of the old rows. Source: transformers'
    convert_llava_weights_to_hf.py, which made the published checkpoints.
    """
    rows = rows.float()
    mean = rows.mean(0)
    centered = (rows - mean) * math.sqrt(1e-5 / len(rows))
    return [mean + torch.randn(count, len(rows), generator=random) @ centered for _ in range(times)]


def init_projector(
    shapes: dict[str, tuple[int, ...]], random: torch.Generator
) -> dict[str, Tensor]:
    """A projector as `nn.Linear` begins: uniform within 1 / sqrt(inputs)."""
    projector = {}
    for name in sorted(shapes):
        if name.startswith("multi_modal_projector."):
            inputs = shapes[f"{name.rpartition('.')[0]}.weight"][1]
            uniform = torch.rand(shapes[name], generator=random) * 2 - 1
            projector[name] = uniform / math.sqrt(inputs)
    return projector


def _check(
    expected: dict[str, tuple[int, ...]], parts: dict[str, tuple[int, ...]], vocabulary: int
) -> None:
    """Raises `CheckpointError` where tensors are missing, surplus or of another shape."""
    wanted = {
        name: (vocabulary, *shape[1:]) if name in (_EMBEDDING, _HEAD) else shape
        for name, shape in expected.items()
        if not name.startswith("multi_modal_projector.")
    }
    differences = [
        f"{name} is {list(parts.get(name, ()))} instead of {list(wanted.get(name, ()))}"
        for name in sorted(wanted.keys() | parts.keys())
        if parts.get(name) != wanted.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise CheckpointError(
            "tower and decoder do not have the expected tensors: "
            f"{'; '.join(differences[:8])}{more}"
        )
