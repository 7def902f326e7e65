"""What a person imports: load a model, ask about images, videos and views, go on talking. Knows no HTTP."""

from ..options import Options
from .bot import BUILTIN, Answer, Chatbot, Chunk, TokenLogprob, estimate, load, locate
from .conversation import Conversation
from .explain import Explanation, Look
from .place import kv_memory, named_dtype, pick_device

__all__ = [
    "BUILTIN",
    "Answer",
    "Chatbot",
    "Chunk",
    "Conversation",
    "Explanation",
    "Look",
    "Options",
    "TokenLogprob",
    "estimate",
    "kv_memory",
    "load",
    "locate",
    "named_dtype",
    "pick_device",
]
