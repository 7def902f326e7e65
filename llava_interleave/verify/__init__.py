"""This package against transformers, and against itself made otherwise: why two numbers differ."""

from .ours import Stage
from .parity import Case, Standard, verify
from .switches import BASELINE, Effect, why

__all__ = ["BASELINE", "Case", "Effect", "Stage", "Standard", "verify", "why"]
