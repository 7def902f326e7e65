"""Many samples from a file, from shards or from a folder, answered into a file. Knows nothing of how answers are made."""

from .run import Answerer, Reply, order, run
from .sources import JsonRow, Sample, Source

__all__ = ["Answerer", "JsonRow", "Reply", "Sample", "Source", "order", "run"]
