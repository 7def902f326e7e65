"""How many operations a forward needs, and how many bytes it reads: what speeds are compared with."""

from itertools import chain

from ..config import LlavaConfig
from .llava import Llava


def vision_flops(c: LlavaConfig) -> int:
    """Operations, two a product, that tower and projector need for a crop."""
    v, out, tokens = c.vision, c.text.hidden_size, c.vision.grid**2
    layer = (
        4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size + 2 * tokens * v.hidden_size
    )
    patches, projector = 3 * v.patch_size**2 * v.hidden_size, (v.hidden_size + out) * out
    return 2 * tokens * (v.num_layers * layer + patches + projector)


def prefill_flops(c: LlavaConfig, tokens: int) -> int:
    """Operations that the decoder needs for a prompt whose last token alone gets logits; each token attends to those up to it."""
    t = c.text
    queries, keys = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    layer = (
        t.hidden_size * (2 * queries + 2 * keys + 3 * t.intermediate_size) + (tokens + 1) * queries
    )
    return 2 * (tokens * t.num_layers * layer + t.hidden_size * t.vocab_size)


def decoder_bytes(model: Llava) -> int:
    """Bytes of weights that are read for every token."""
    parts = (model.language_model.layers, model.language_model.norm, model.lm_head)
    return sum(
        tensor.nbytes for part in parts for tensor in chain(part.parameters(), part.buffers())
    )
