"""Batch inference on samples of a file, of shards or of a folder. Knows no models."""

from ..journal import JsonRow
from .run import Reply, ReplyFn, order, run
from .sources import Sample, Source

__all__ = ["JsonRow", "Reply", "ReplyFn", "Sample", "Source", "order", "run"]
