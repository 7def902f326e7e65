"""The network: SigLIP tower, projector, Qwen2 decoder. Knows no caches, batches, padding,
tokenizers or files."""

from .attention import AttentionFn, AttentionRecorder, PackedAttention
from .image_tokens import arrange_features
from .llava import Llava

__all__ = ["AttentionFn", "AttentionRecorder", "Llava", "PackedAttention", "arrange_features"]
