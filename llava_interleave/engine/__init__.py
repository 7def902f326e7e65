"""Generation: continuous batching, KV memory, prefix and feature caches, sampling. Used from one thread; knows no text."""

from .engine import Engine, Load
from .events import Event, FinishReason, Timings, Usage
from .kv_contiguous import bytes_per_token
from .request import Request
from .sampler import SamplingParams, TokenConstraint

__all__ = [
    "Engine",
    "Event",
    "FinishReason",
    "Load",
    "Request",
    "SamplingParams",
    "Timings",
    "TokenConstraint",
    "Usage",
    "bytes_per_token",
]
