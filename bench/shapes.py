"""The shapes of the published checkpoints, for random weights that take as long."""

from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig
from llava_interleave.image_layout import ONEVISION

SHAPES = {
    "0.5b": LlavaConfig(
        VisionConfig(), TextConfig(1024, 2816, 24, 16, 16, 64, 152000, 32768, 1e6, 1e-6, True)
    ),
    "7b": LlavaConfig(
        VisionConfig(), TextConfig(4096, 11008, 32, 32, 32, 128, 152000, 32768, 1e6, 1e-6, False)
    ),
    "onevision-0.5b": LlavaConfig(
        VisionConfig(),
        TextConfig(896, 4864, 24, 14, 2, 64, 152000, 32768, 1e6, 1e-6, True),
        arrangement=ONEVISION,
        video_token_id=151647,
    ),
    "onevision-7b": LlavaConfig(
        VisionConfig(),
        TextConfig(3584, 18944, 28, 28, 4, 128, 152128, 32768, 1e6, 1e-6, False),
        arrangement=ONEVISION,
        video_token_id=151647,
    ),
}
