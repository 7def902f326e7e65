"""Frozen shapes of vision, text and model, from and to a checkpoint's config.json. Knows no torch and no files."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The SigLIP tower. `num_layers` counts the layers whose output is used (26 of so400m's 27)."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 26
    num_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Features a side: 384 // 14 = 27."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The Qwen2 decoder. The defaults are transformers' `Qwen2Config` defaults, which the 7B file relies on."""

    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    vocab_size: int = 151936
    context: int = 32768
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False


@dataclass(frozen=True, slots=True)
class LlavaConfig:
    """The whole network: tower, two-layer GELU projector, decoder."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 151646
