"""Tiny complete checkpoints with random weights, for tests and for trials without a download."""

from __future__ import annotations

import math
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from .checkpoints import CheckpointLayout, meta_network, tensor_shapes, write_checkpoint
from .config import LlavaConfig, TextConfig, VisionConfig
from .image_layout import ONEVISION
from .processing.processor_files import SPECIAL, processor_files
from .processing.tokenizer import VIDEO, qwen2_tokenizer

_SENTENCES = (
    "You are a helpful assistant.",
    "What is the difference between the first image and the second image?",
    "The red square moved from the left to the right, and the blue circle is gone.",
    "user\nHow many shapes are there? Which one is behind the others?\nassistant\nThere are three "
    "shapes.",
    "front: left: back: right: This is a video. Describe what happens, in order.",
)


def tiny_config(
    *, vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None
) -> LlavaConfig:
    """A network of 0.1 M parameters; `vision` and `text` replace fields of `VisionConfig` and
    `TextConfig`.

    As in the real one, the tower's image (30) is no multiple of its patch (7), there is no GQA, the
    head is tied, and the vocabulary has ids beyond the tokenizer's.
    """
    size = tiny_tokenizer().get_vocab_size()
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "image_size": 30,
        "patch_size": 7,
    }
    decoder: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
        "vocab_size": size // 64 * 64 + 64,
        "context": 4096,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    } | dict(text or {})
    decoder.setdefault("head_dim", decoder["hidden_size"] // decoder["num_heads"])
    return LlavaConfig(
        VisionConfig(**(tower | dict(vision or {}))), TextConfig(**decoder), size - 1
    )


def tiny_onevision_config(
    *, vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None
) -> LlavaConfig:
    """As `tiny_config`, arranged as LLaVA-OneVision, with GQA and `<video>` after `<image>`.

    The grid is odd (5 x 5 features), as the published 27 x 27: on an even one bilinear pooling and
    average pooling are the same.
    """
    config = tiny_config(
        vision={"image_size": 35, **(vision or {})}, text={"num_kv_heads": 2, **(text or {})}
    )
    return replace(config, arrangement=ONEVISION, video_token_id=config.image_token_id + 1)


def tiny_checkpoint(
    folder: str | Path,
    config: LlavaConfig | None = None,
    seed: int = 0,
    layout: CheckpointLayout = "hub",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a checkpoint of random weights that transformers loads, too; -> its folder.

    A tensor's values depend on its name and `seed` only, so all layouts and shardings are the same
    network.
    """
    config = config or tiny_config()
    with tempfile.TemporaryDirectory() as source:
        tokenizer = tiny_tokenizer()
        if config.video_token_id is not None:
            tokenizer = Tokenizer.from_str(tokenizer.to_str())
            tokenizer.add_special_tokens([AddedToken(VIDEO, special=True, normalized=False)])
        processor_files(source, config, tokenizer)
        write_random(
            folder,
            config,
            source,
            seed,
            layout=layout,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )
    return Path(folder)


def write_random(
    folder: str | Path,
    config: LlavaConfig,
    processor_from: str | Path | None,
    seed: int = 0,
    *,
    layout: CheckpointLayout = "hub",
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """A checkpoint of random weights of any size, one tensor in memory at a time."""
    sizes = tensor_shapes(meta_network(config))
    write_checkpoint(
        folder,
        config,
        lambda name: random_tensor(name, sizes[name], seed),
        processor_from=processor_from,
        layout=layout,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random weights that keep activations near 1: norms near 1, matrices scaled by their
    inputs."""
    noise = torch.randn(
        shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    )
    if len(shape) == 1:
        return noise * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return noise if "embed" in name else noise / math.sqrt(math.prod(shape[1:]))


@cache
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of 384 pieces in Qwen2's form, `SPECIAL` tokens right after them."""
    return train_tokenizer(_SENTENCES, 384)


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` pieces, trained on `texts`; NFC, Qwen2's pre-tokenizer and
    `SPECIAL` tokens."""
    tokenizer = qwen2_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer
