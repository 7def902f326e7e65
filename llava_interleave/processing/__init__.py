"""Messages with images, videos and views become one `Prompt`.

Knows no networks, devices or HTTP servers.
"""

from .limits import Limits
from .loader import Loader
from .processor import DEFAULT, Estimate, EstimateItem, PreparedImage, Processor, PromptOptions
from .tokenizer import TextStream, Tokenizer
from .video import Clip, FrameSampling

__all__ = [
    "DEFAULT",
    "Clip",
    "Estimate",
    "EstimateItem",
    "FrameSampling",
    "Limits",
    "Loader",
    "PreparedImage",
    "Processor",
    "PromptOptions",
    "TextStream",
    "Tokenizer",
]
