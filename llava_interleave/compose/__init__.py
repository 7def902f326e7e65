"""Compose a LLaVA checkpoint from a vision tower and a language model, with a new projector."""

from .compose import compose

__all__ = ["compose"]
