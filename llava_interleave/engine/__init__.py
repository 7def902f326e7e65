"""Generation: continuous batching, KV memory, prefix and feature caches, sampling. Used from one thread; knows no text."""

from .engine import Engine, Load
from .events import Event, FinishReason, Timings, Usage
from .memory import bytes_per_token
from .request import Request
from .sampling import Guide, Sampling

__all__ = ["Engine", "Event", "FinishReason", "Guide", "Load", "Request", "Sampling", "Timings", "Usage", "bytes_per_token"]
