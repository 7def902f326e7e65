"""Parity with transformers, and ablations: which setting makes two results differ."""

from .ablations import BASELINE, AblationResult, ablate
from .candidate import LayerDiff
from .parity import ParityCase, Tolerance, verify

__all__ = ["BASELINE", "AblationResult", "LayerDiff", "ParityCase", "Tolerance", "ablate", "verify"]
