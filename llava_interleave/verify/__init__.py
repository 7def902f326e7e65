"""This package against transformers, and against itself made otherwise: why two numbers differ."""

from .parity import Case, Stage, verify
from .switches import BASELINE, Effect, why

__all__ = ["BASELINE", "Case", "Effect", "Stage", "verify", "why"]
