"""Checkpoints in and out: safetensors in every layout of the family, strict; local folders and the hub. Knows no engines."""

from .files import fingerprint, read_config, read_json
from .hub import resolve
from .layouts import LAYOUTS, CheckpointLayout
from .load import load, shapes, skeleton
from .save import save, write_checkpoint

__all__ = [
    "LAYOUTS",
    "CheckpointLayout",
    "fingerprint",
    "load",
    "read_config",
    "read_json",
    "resolve",
    "save",
    "shapes",
    "skeleton",
    "write_checkpoint",
]
