"""A decoder in a GGUF file: Qwen2 or Llama, dequantized. Needs the package gguf, which is
optional."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from torch import Tensor

from ..config import TextConfig
from ..errors import CheckpointError
from ..processing.tokenizer import SPLIT, Tokenizer

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {
    "token_embd.weight": "language_model.embed_tokens.weight",
    "output_norm.weight": "language_model.norm.weight",
    "output.weight": "lm_head.weight",
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of tokens


class GgufFile:
    """Fields and tensors of a file; tensors are dequantized one at a time."""

    def __init__(self, path: Path) -> None:
        """Raises `CheckpointError` for a file that is not GGUF."""
        import gguf

        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
        self._dequantize = gguf.quants.dequantize
        self.fields = {name: field.contents for name, field in reader.fields.items()}
        self._stored = reader.tensors

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The file's tensors by the network's names."""
        return {self.network_name(one.name): one for one in self._stored}

    def network_name(self, name: str) -> str:
        """The network's name of a tensor. Raises `CheckpointError` where it has none."""
        raise NotImplementedError

    def field(self, name: str, default: Any = None) -> Any:
        """A field's value. Raises `CheckpointError` where it is missing and has no default."""
        if name in self.fields:
            return self.fields[name]()
        if default is None:
            raise CheckpointError(f"{self.path} has no {name}")
        return default

    def decimal(self, name: str, default: Any = None) -> float:
        """The shortest decimal number that is this float32: 1e-5, not 9.99999974e-06."""
        return float(str(np.float32(self.field(name, default))))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the network's names."""
        return {name: tuple(map(int, one.shape[::-1])) for name, one in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """In float32."""
        stored = self.tensors[name]
        values = np.array(self._dequantize(stored.data, stored.tensor_type), np.float32)
        return torch.from_numpy(values).view(*map(int, stored.shape[::-1]))


class GgufDecoder(GgufFile):
    """The decoder and the tokenizer of a file."""

    tokenizer_class = "PreTrainedTokenizerFast"
    dtype = torch.bfloat16

    def __init__(self, path: Path) -> None:
        """Raises `CheckpointError` for a file of another kind."""
        super().__init__(path)
        self.architecture = self.field("general.architecture")
        if self.architecture not in ("qwen2", "llama"):
            raise CheckpointError(
                f"{path} has the architecture {self.architecture!r}; supported are qwen2 and llama"
            )

    def network_name(self, name: str) -> str:
        kind, number, part, suffix = (*name.split("."), "", "", "")[:4]
        if name in OUTER:
            return OUTER[name]
        if kind == "blk" and part in LAYER:
            return f"language_model.layers.{number}.{LAYER[part]}.{suffix}"
        raise CheckpointError(f"{self.path} has a tensor {name} that this network does not have")

    @cached_property
    def config(self) -> TextConfig:
        def get(name: str, default: Any = None) -> Any:
            return self.field(f"{self.architecture}.{name}", default)

        if self.fields.get(f"{self.architecture}.rope.scaling.type") and (
            get("rope.scaling.type") != "none"
        ):
            raise CheckpointError(f"{self.path} scales RoPE, which is not supported")
        width, heads = get("embedding_length"), get("attention.head_count")
        return TextConfig(
            hidden_size=width,
            intermediate_size=get("feed_forward_length"),
            num_layers=get("block_count"),
            num_heads=heads,
            num_kv_heads=get("attention.head_count_kv", heads),
            head_dim=get("attention.key_length", width // heads),
            vocab_size=self.shapes()["language_model.embed_tokens.weight"][0],
            context=get("context_length"),
            rope_theta=self.decimal(f"{self.architecture}.rope.freq_base", 10000.0),
            rms_norm_eps=self.decimal(f"{self.architecture}.attention.layer_norm_rms_epsilon"),
            tie_word_embeddings="lm_head.weight" not in self.tensors,
            attention_bias="language_model.layers.0.self_attn.q_proj.bias" in self.tensors,
        )

    def tensor(self, name: str) -> Tensor:
        """In float32."""
        tensor = super().tensor(name)
        if self.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighboring rows of a head, transformers its two halves
            shape, half = tensor.shape, self.config.head_dim // 2
            tensor = tensor.view(-1, half, 2, shape[1]).transpose(1, 2).reshape(shape)
        return tensor

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE in the file. Raises `CheckpointError` for another kind."""
        if (model := self.field("tokenizer.ggml.model")) != "gpt2":
            raise CheckpointError(
                f"{self.path} has a tokenizer of the kind {model!r}; supported is byte-level BPE "
                "('gpt2')"
            )
        tokens = self.field("tokenizer.ggml.tokens")
        kinds = self.field("tokenizer.ggml.token_type")
        merges = [tuple(pair.split(" ")) for pair in self.field("tokenizer.ggml.merges", [])]
        vocab = {
            t: i
            for i, (t, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (_NORMAL, _CONTROL, _USER_DEFINED)
        }
        backend = Backend(BPE(vocab=vocab, merges=[m for m in merges if set(m) <= vocab.keys()]))
        # Files of Qwen1.5 from before llama.cpp wrote the split have none.
        default = "qwen2" if self.architecture == "qwen2" else "default"
        self._pre_tokenizer(backend, self.field("tokenizer.ggml.pre", default))
        backend.decoder = decoders.ByteLevel()
        for token, kind in zip(tokens, kinds, strict=True):
            if kind in (_CONTROL, _USER_DEFINED):
                added = AddedToken(token, special=kind == _CONTROL, normalized=False)
                (backend.add_special_tokens if kind == _CONTROL else backend.add_tokens)([added])
        return Tokenizer(backend)

    def _pre_tokenizer(self, backend: Backend, name: str) -> None:
        """The split of text into words, by llama.cpp's name of it."""
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if name == "qwen2":
            backend.normalizer = normalizers.NFC()
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        elif name == "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        elif name in ("gpt-2", "default"):
            backend.pre_tokenizer = words
        else:
            raise CheckpointError(
                f"{self.path} splits text as {name!r}; supported are qwen2, smollm and gpt-2: give "
                "the model's own tokenizer (--tokenizer FOLDER)"
            )
