"""Answers that were published for checkpoints of LLaVA-OneVision, to compare real files with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RADAR = (
    "https://github.com/haotian-liu/LLaVA/raw/1a91fc274d7c35a9b50b3cb29c4247ae5837ce39/images/"
    "llava_v1_5_radar.jpg"
)
QUESTION = "What is shown in this image?"
COLUMNS = ("checkpoint", "command", "prompt tokens of the image", "answer begins")
# Source: transformers, convert_llava_onevision_weights_to_hf.py, float16, greedy.
_ANSWERS = {
    "0.5b-si": "The image is a radar chart that shows the performance of different algorithms or "
    "models in a specific domain,",
    "0.5b-ov": "The image is a radar chart that compares the performance of different models in a "
    "specific task,",
    "7b-si": "This image is a radar chart that compares the performance of different models on "
    "various metrics. The models being compared are BLIP-2, InstructBLIP, and Qwen-VL-Chat.",
    "7b-ov": "The image shows a radar chart, also known as a spider chart or a star chart, which "
    "is used to compare multiple quantitative variables.",
}
_SIZES = {896: "0.5b", 3584: "7b"}
"""Width of the decoder: size of the checkpoint."""
IMAGE_TOKENS = 6551
"""Of the radar chart, 899 x 1024 pixels (height, width)."""


def published_answers(model: str, config: Mapping[str, Any]) -> list[list[str]]:
    """Rows of `COLUMNS` for a config.json of OneVision's; none for other checkpoints.

    A config does not say whether it is of the single-image stage (si) or of the last one (ov).
    """
    text = config.get("text_config") or config
    aspect = config.get("vision_aspect_ratio") or config.get("image_aspect_ratio")
    size = _SIZES.get(text.get("hidden_size", 0))
    if aspect != "anyres_max_9" or config.get("mm_newline_position") == "grid" or size is None:
        return []
    command = f'llava ask -m {model} -a llava_v1_5_radar.jpg "{QUESTION}"'
    return [
        [name, command, f"{IMAGE_TOKENS:,}", answer]
        for name, answer in _ANSWERS.items()
        if name.startswith(f"{size}-")
    ]
