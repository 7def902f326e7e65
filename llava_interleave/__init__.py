"""LLaVA-Interleave: many images, videos and views in, text out.

`load()` gives a `Chatbot`; the names below are imported when they are first used, so that importing
the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .chat import Answer, AnswerDelta, Chatbot, Conversation, Options, load
    from .errors import LlavaError

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "AnswerDelta",
    "Chatbot",
    "Conversation",
    "LlavaError",
    "Options",
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(
        importlib.import_module(".errors" if name == "LlavaError" else ".chat", __name__), name
    )


def __dir__() -> list[str]:
    return list(__all__)
