"""Short names of the published checkpoints."""

PUBLISHED = {
    "interleave-0.5b": "llava-hf/llava-interleave-qwen-0.5b-hf",
    "interleave-7b": "llava-hf/llava-interleave-qwen-7b-hf",
    "interleave-7b-dpo": "llava-hf/llava-interleave-qwen-7b-dpo-hf",
    "onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "onevision-7b-chat": "llava-hf/llava-onevision-qwen2-7b-ov-chat-hf",
    "onevision-72b": "llava-hf/llava-onevision-qwen2-72b-ov-hf",
    "video-7b": "lmms-lab/LLaVA-Video-7B-Qwen2",
    "video-72b": "lmms-lab/LLaVA-Video-72B-Qwen2",
}
"""By name, the repository on the Hugging Face hub."""
