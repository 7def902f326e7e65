"""Names of the network's tensors in each checkpoint layout of the family."""

from typing import Literal, get_args

from ..config import LlavaConfig, VisionConfig

CheckpointLayout = Literal[
    "hub", "original", "transformers-4.52", "transformers-5", "transformers-5.23"
]
LAYOUTS: tuple[CheckpointLayout, ...] = get_args(CheckpointLayout)

_HEAD = "lm_head."
_DECODER = "language_model."
_TOWER = "vision_tower."
_NEWLINE = "image_newline"
_FIRST, _SECOND = "multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."

# Prefix in the network -> stored prefix. "hub": as uploaded by llava-hf; "original": by lmms-lab;
# the others: as saved by these releases.
_PREFIXES: dict[CheckpointLayout, dict[str, str]] = {
    "hub": {
        _DECODER: "language_model.model.",
        _HEAD: "language_model.lm_head.",
        _TOWER: "vision_tower.vision_model.",
        _FIRST: _FIRST,
        _SECOND: _SECOND,
        _NEWLINE: _NEWLINE,
    },
    "original": {
        _DECODER: "model.",
        _HEAD: _HEAD,
        _TOWER: "model.vision_tower.vision_tower.vision_model.",
        _FIRST: "model.mm_projector.0.",
        _SECOND: "model.mm_projector.2.",
        _NEWLINE: f"model.{_NEWLINE}",
    },
    "transformers-4.52": {
        _DECODER: "model.language_model.",
        _HEAD: _HEAD,
        _TOWER: "model.vision_tower.vision_model.",
        _FIRST: f"model.{_FIRST}",
        _SECOND: f"model.{_SECOND}",
        _NEWLINE: f"model.{_NEWLINE}",
    },
    "transformers-5": {
        _DECODER: "model.language_model.",
        _HEAD: _HEAD,
        _TOWER: "model.vision_tower.",
        _FIRST: f"model.{_FIRST}",
        _SECOND: f"model.{_SECOND}",
        _NEWLINE: f"model.{_NEWLINE}",
    },
    "transformers-5.23": {
        _DECODER: "language_model.model.",
        _HEAD: "language_model.lm_head.",
        _TOWER: "vision_tower.",
        _FIRST: _FIRST,
        _SECOND: _SECOND,
        _NEWLINE: _NEWLINE,
    },
}
_BY_STORED_PREFIX = sorted(
    ((stored, own) for names in _PREFIXES.values() for own, stored in names.items()),
    key=lambda pair: -len(pair[0]),
)


def network_name(stored: str) -> str:
    """The network's name of a stored tensor of any layout; the longest known prefix decides."""
    for prefix, own in _BY_STORED_PREFIX:
        if stored.startswith(prefix):
            return own + stored.removeprefix(prefix)
    return stored


def stored_name(name: str, layout: CheckpointLayout) -> str:
    """The name under which the network's tensor `name` is stored in `layout`."""
    for own, prefix in _PREFIXES[layout].items():
        if name.startswith(own):
            return prefix + name.removeprefix(own)
    raise AssertionError(name)


def is_ignored(name: str, config: LlavaConfig) -> bool:
    """Whether a checkpoint may hold a tensor that the network does not have."""
    if name == _NEWLINE:
        return not config.arrangement.newline
    if name.endswith((".rotary_emb.inv_freq", ".embeddings.position_ids")):
        return True
    if not isinstance(vision := config.vision, VisionConfig):
        return False
    first = vision.num_layers
    spare = (f"{_TOWER}encoder.layers.{i}." for i in range(first, first + vision.spare_layers))
    return name.startswith((f"{_TOWER}post_layernorm.", f"{_TOWER}head.", *spare))
