"""This package against transformers, and against itself made otherwise: why two numbers differ."""

from .ablations import BASELINE, AblationResult, why
from .candidate import LayerDiff
from .parity import ParityCase, Tolerance, verify

__all__ = ["BASELINE", "AblationResult", "LayerDiff", "ParityCase", "Tolerance", "verify", "why"]
