"""The network: SigLIP tower, projector, Qwen2 decoder. Knows no caches, batches, padding, tokenizers or files."""

from .attention import AttentionFn, AttentionRecorder, PackedAttention
from .llava import Llava, arrange_features

__all__ = ["AttentionFn", "AttentionRecorder", "Llava", "PackedAttention", "arrange_features"]
