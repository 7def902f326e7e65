"""Checkpoints in and out: safetensors in every layout of the family, strict; local folders and the hub. Knows no engines."""

from ..config import read_json
from .adapters import adapter_fingerprint, read_adapter, write_adapter
from .files import fingerprint, read_config, stored_precision
from .hub import resolve
from .layouts import LAYOUTS, CheckpointLayout
from .load import load, shapes, size, skeleton
from .save import save, write_checkpoint

__all__ = [
    "LAYOUTS",
    "CheckpointLayout",
    "adapter_fingerprint",
    "fingerprint",
    "load",
    "read_adapter",
    "read_config",
    "read_json",
    "resolve",
    "save",
    "shapes",
    "size",
    "skeleton",
    "stored_precision",
    "write_adapter",
    "write_checkpoint",
]
