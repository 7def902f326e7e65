"""The network: SigLIP tower, projector, Qwen2 decoder. Knows no caches, batches, padding,
tokenizers or files."""

from .attention import AttentionFn, ContinuationAttention, PackedAttention, StoredKV
from .image_tokens import arrange_features
from .llava import Llava

__all__ = [
    "AttentionFn",
    "ContinuationAttention",
    "Llava",
    "PackedAttention",
    "StoredKV",
    "arrange_features",
]
