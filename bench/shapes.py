"""The shapes of the published checkpoints, for random weights that take as long."""

from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig

SHAPES = {
    "0.5b": LlavaConfig(
        VisionConfig(), TextConfig(1024, 2816, 24, 16, 16, 64, 152000, 32768, 1e6, 1e-6, True)
    ),
    "7b": LlavaConfig(
        VisionConfig(), TextConfig(4096, 11008, 32, 32, 32, 128, 152000, 32768, 1e6, 1e-6, False)
    ),
}
