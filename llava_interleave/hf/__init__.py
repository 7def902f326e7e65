"""The model card's names with this package's engine: change a snippet's import line, keep the rest.

With transformers installed (the extra `hf`), every name is transformers' own, but the models of
`LlavaForConditionalGeneration`, `AutoModelForImageTextToText` and `pipeline` generate by the engine
wherever it computes the same (`hf.transformers_engine`); `use_engine` does that to a loaded model.
`LlavaOnevisionForConditionalGeneration` likewise. transformers' processor of OneVision needs
torchvision; without torchvision `AutoProcessor` and `LlavaOnevisionProcessor` are this package's.
Without transformers there are `AutoProcessor`, `BatchFeature`, `LlavaForConditionalGeneration`,
`LlavaOnevisionForConditionalGeneration`, `LlavaOnevisionProcessor` and `pipeline`, with inputs and
outputs equal to transformers'; other names and arguments raise `Unsupported`, which names the
extra.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported

if TYPE_CHECKING:
    from .model import LlavaForConditionalGeneration, LlavaOnevisionForConditionalGeneration
    from .pipelines import pipeline
    from .processor import AutoProcessor, BatchFeature, LlavaOnevisionProcessor

__all__ = [
    "AutoProcessor",
    "BatchFeature",
    "LlavaForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "LlavaOnevisionProcessor",
    "pipeline",
]

_WITH_ENGINE = (
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "LlavaForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "LlavaOnevisionProcessor",
    "pipeline",
    "use_engine",
)
_LIGHT = {
    "AutoProcessor": "processor",
    "BatchFeature": "processor",
    "LlavaForConditionalGeneration": "model",
    "LlavaOnevisionForConditionalGeneration": "model",
    "LlavaOnevisionProcessor": "processor",
    "pipeline": "pipelines",
}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if importlib.util.find_spec("transformers") is not None:
        owner = f"{__name__}.transformers_engine" if name in _WITH_ENGINE else "transformers"
        return getattr(importlib.import_module(owner), name)
    if name in _LIGHT:
        return getattr(importlib.import_module(f"{__name__}.{_LIGHT[name]}"), name)
    raise Unsupported(
        f"hf.{name} needs transformers: pip install 'llava-interleave[hf]'; without it there are "
        + ", ".join(_LIGHT)
    )
