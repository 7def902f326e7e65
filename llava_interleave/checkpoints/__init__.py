"""Checkpoints in and out: safetensors in every layout of the family, strict; local folders and the
hub. Knows no engines."""

from ..config_json import read_json
from .adapters import adapter_fingerprint, read_adapter, write_adapter
from .checkpoint import Checkpoint, fingerprint
from .hub import resolve
from .layouts import LAYOUTS, CheckpointLayout
from .load import load, meta_network, tensor_shapes, weight_bytes
from .save import save, write_checkpoint

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "CheckpointLayout",
    "adapter_fingerprint",
    "fingerprint",
    "load",
    "meta_network",
    "read_adapter",
    "read_json",
    "resolve",
    "save",
    "tensor_shapes",
    "weight_bytes",
    "write_adapter",
    "write_checkpoint",
]
