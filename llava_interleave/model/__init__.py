"""The network: SigLIP tower, projector, Qwen2 decoder. Knows no caches, batches, padding, tokenizers or files."""

from .attend import Attend, Packed, Recorded
from .llava import Llava, arrange

__all__ = ["Attend", "Llava", "Packed", "Recorded", "arrange"]
