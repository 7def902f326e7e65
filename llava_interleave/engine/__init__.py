"""Generation: continuous batching, KV memory, prefix and feature caches, sampling. Used from one
thread; knows no text.
"""

from ..options import SamplingParams
from .engine import Engine, Load
from .kv_contiguous import bytes_per_token
from .request import Event, FinishReason, Request, Timings, Usage
from .sampler import TokenConstraint

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
