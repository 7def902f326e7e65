"""Many samples from a file, from shards or from a folder, answered into a file. Knows nothing of how answers are made."""

from .run import Answerer, Reply, order, run
from .source import Row, Sample, Source

__all__ = ["Answerer", "Reply", "Row", "Sample", "Source", "order", "run"]
