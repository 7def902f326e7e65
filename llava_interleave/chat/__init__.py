"""The Python API: load a model, ask about images, videos and views. Knows no HTTP."""

from ..attribution.attribution import Attribution, ImageAttribution
from ..options import Options
from ..placement import kv_memory, named_dtype, pick_device
from .chatbot import Chatbot
from .conversation import Conversation
from .detokenize import Answer, AnswerDelta, TokenLogprob
from .live import LiveSession
from .loading import BUILTIN, estimate, load, locate

__all__ = [
    "BUILTIN",
    "Answer",
    "AnswerDelta",
    "Attribution",
    "Chatbot",
    "Conversation",
    "ImageAttribution",
    "LiveSession",
    "Options",
    "TokenLogprob",
    "estimate",
    "kv_memory",
    "load",
    "locate",
    "named_dtype",
    "pick_device",
]
