"""A checkpoint as llama.cpp has it: the decoder in one GGUF file, tower and projector in another.

Names and keys: llama.cpp's gguf-py (constants.py) and tools/mtmd/clip.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.files import new_folder
from ..config import TextConfig, VisionConfig
from ..config_json import read_json
from ..errors import CheckpointError, Unsupported
from ..model import Llava
from ..processing.tokenizer import IM_END
from .gguf_decoder import LAYER, OUTER, GgufFile

DECODER, MMPROJ = "decoder.gguf", "mmproj.gguf"
GgufType = Literal["f16", "bf16", "q8_0", "q4_0"]
BLOCK = 32
"""Numbers of a row that q8_0 and q4_0 quantize together."""
_TOWER_LAYER = {
    "ln1": "layer_norm1",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_TOWER_OUTER = {
    "v.patch_embd.weight": "vision_tower.embeddings.patch_embedding.weight",
    "v.patch_embd.bias": "vision_tower.embeddings.patch_embedding.bias",
    "v.position_embd.weight": "vision_tower.embeddings.position_embedding.weight",
    "mm.0.weight": "multi_modal_projector.linear_1.weight",
    "mm.0.bias": "multi_modal_projector.linear_1.bias",
    "mm.2.weight": "multi_modal_projector.linear_2.weight",
    "mm.2.bias": "multi_modal_projector.linear_2.bias",
}
_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}"
    "{% if part.text == '<__media__>' %}{{ '\n' }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Preset interleave; llama.cpp gives images as its marker, where they are in the message."""


def write_gguf(model: Llava, folder: str | Path, processor_from: Path, dtype: GgufType) -> None:
    """Write `decoder.gguf` and `mmproj.gguf`, which llama.cpp reads with `--mmproj`.

    dtype: of the decoder's matrices; rows that a block does not divide are float16. Tower and
    projector are in bf16 where that is bf16, and in f16 otherwise. Raises `Unsupported` for a model
    that llama.cpp's projector `mlp` does not compute: tiles with newlines, another tower.
    """
    config = model.config
    if not isinstance(config.vision, VisionConfig) or config.arrangement.newline:
        raise Unsupported(
            "GGUF files are written for a SigLIP tower with an image in one piece (LLaVA-NeXT-"
            "Interleave and composed models); llama.cpp has no other form of this family"
        )
    if any(value.dtype not in _FLOATS for value in model.state_dict().values()):
        raise Unsupported("GGUF files are written from float weights, not from quantized ones")
    with new_folder(Path(folder)) as partial:
        _write_decoder(model, partial / DECODER, processor_from, dtype)
        _write_tower(model, partial / MMPROJ, processor_from, "bf16" if dtype == "bf16" else "f16")


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _write_decoder(model: Llava, path: Path, source: Path, dtype: GgufType) -> None:
    import gguf

    text = model.config.text
    architecture = "qwen2" if text.attention_bias else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(text.context)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_heads)
    writer.add_head_count_kv(text.num_kv_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_vocab_size(text.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"])
    _add_vocabulary(writer, source, text.vocab_size)
    tensors = dict(model.state_dict())
    if text.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, stored in _names(text.num_layers, "blk", LAYER, "language_model.layers", OUTER):
        if (values := tensors.get(stored)) is not None:
            values = rotated(values, text) if _rotates(architecture, stored) else values
            # the embedding and the head are the most sensitive
            outer = dtype == "q4_0" and name in OUTER
            _add(writer, name, values, "q8_0" if outer else dtype)
    _finish(writer)


def _write_tower(model: Llava, path: Path, source: Path, dtype: GgufType) -> None:
    import gguf

    vision = model.config.vision
    assert isinstance(vision, VisionConfig)
    pixels = read_json(source / "preprocessor_config.json")
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(model.config.text.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_layers)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(pixels["image_mean"])
    writer.add_vision_image_std(pixels["image_std"])
    writer.add_vision_use_gelu(True)
    # without it llama.cpp leaves the last layer out, as LLaVA-1.5 does
    writer.add_array("clip.vision.feature_layer", [vision.num_layers])
    tensors = model.state_dict()
    layers = "vision_tower.encoder.layers"
    for name, stored in _names(vision.num_layers, "v.blk", _TOWER_LAYER, layers, _TOWER_OUTER):
        _add(writer, name, tensors[stored], dtype)
    _finish(writer)


def _names(
    layers: int, prefix: str, inner: Mapping[str, str], ours: str, outer: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """(name in the file, name in the network) of all tensors, biases that may be absent too."""
    yield from outer.items()
    for layer in range(layers):
        for name, own in inner.items():
            for kind in ("weight", "bias"):
                yield f"{prefix}.{layer}.{name}.{kind}", f"{ours}.{layer}.{own}.{kind}"


def _rotates(architecture: str, name: str) -> bool:
    return architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight"))


def rotated(values: Tensor, text: TextConfig) -> Tensor:
    """Rows of a head as llama.cpp rotates them: neighbors instead of halves. [rows, inputs]"""
    half = text.head_dim // 2
    return values.view(-1, 2, half, values.shape[1]).transpose(1, 2).reshape(values.shape)


def _add(writer: Any, name: str, values: Tensor, dtype: GgufType) -> None:
    """Matrices in `dtype`; biases, norms, positions and patches in float32, as llama.cpp has
    them.
    """
    import gguf

    kind = gguf.GGMLQuantizationType.F32
    if values.ndim == 2 and "position" not in name:
        blocks = dtype in ("f16", "bf16") or values.shape[1] % BLOCK == 0
        kind = gguf.GGMLQuantizationType[dtype.upper() if blocks else "F16"]
    numbers = values.detach().float().numpy()
    writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)


def _add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """The byte-level BPE of a folder's tokenizer.json, with unused tokens up to `size`."""
    import gguf

    spec = read_json(folder / "tokenizer.json")
    if spec["model"]["type"] != "BPE":
        raise Unsupported(f"the tokenizer is {spec['model']['type']}; GGUF files have BPE here")
    pieces = {
        number: (piece, gguf.TokenType.NORMAL) for piece, number in spec["model"]["vocab"].items()
    }
    for one in spec["added_tokens"]:
        kind = gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
        pieces[one["id"]] = (one["content"], kind)
    rows = [pieces.get(number, (f"[PAD{number}]", gguf.TokenType.UNUSED)) for number in range(size)]
    merges = [one if isinstance(one, str) else " ".join(one) for one in spec["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(spec.get("pre_tokenizer") or {}))
    writer.add_token_list([piece for piece, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(
        next(number for number, (piece, _) in pieces.items() if piece == IM_END)
    )
    writer.add_add_bos_token(False)
    writer.add_chat_template(_TEMPLATE)


def _split(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name of how text is split into words."""
    parts = spec.get("pretokenizers", [spec])
    kinds = [part.get("type") for part in parts]
    if kinds == ["Split", "ByteLevel"]:
        return "qwen2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    raise Unsupported(f"llama.cpp has no name for a tokenizer that splits text by {kinds}")


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class GgufTower(GgufFile):
    """The SigLIP tower and the projector of an mmproj file. Raises `CheckpointError` for another
    kind.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if self.field("general.architecture") != "clip":
            raise CheckpointError(f"{path} is not an mmproj file: its architecture is not clip")
        if (kind := self.field("clip.projector_type")) != "mlp":
            raise CheckpointError(f"{path} has the projector {kind!r}; supported is 'mlp'")
        for name in ("image_mean", "image_std"):
            if not np.allclose(self.field(f"clip.vision.{name}"), 0.5):
                raise CheckpointError(f"{path} normalizes images otherwise than SigLIP ({name})")

    def network_name(self, name: str) -> str:
        if name in _TOWER_OUTER:
            return _TOWER_OUTER[name]
        kind, block, number, part, suffix = (*name.split("."), "", "", "", "")[:5]
        if (kind, block) == ("v", "blk") and part in _TOWER_LAYER:
            return f"vision_tower.encoder.layers.{number}.{_TOWER_LAYER[part]}.{suffix}"
        raise CheckpointError(f"{self.path} has a tensor {name} that a SigLIP tower does not have")

    @cached_property
    def config(self) -> VisionConfig:
        def get(name: str) -> Any:
            return self.field(f"clip.vision.{name}")

        layers = get("block_count")
        if get("feature_layer") not in (layers, [layers]):
            raise CheckpointError(f"{self.path} takes features before its last layer")
        return VisionConfig(
            hidden_size=get("embedding_length"),
            intermediate_size=get("feed_forward_length"),
            num_layers=layers,
            num_heads=get("attention.head_count"),
            image_size=get("image_size"),
            patch_size=get("patch_size"),
            layer_norm_eps=self.decimal("clip.vision.attention.layer_norm_epsilon"),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tower, without the projector."""
        return {name: s for name, s in super().shapes().items() if name.startswith("vision_tower.")}

    def projector(self) -> dict[str, Tensor]:
        """The projector's tensors."""
        names = [name for name in self.tensors if name.startswith("multi_modal_projector.")]
        return {name: self.tensor(name) for name in names}
