"""The names that tensors of this network have in checkpoints, for each of the family's layouts."""

from typing import Literal, get_args

from ..config import LlavaConfig

CheckpointLayout = Literal["hub", "original", "transformers-4.52", "transformers-5"]
LAYOUTS: tuple[CheckpointLayout, ...] = get_args(CheckpointLayout)

_HEAD = "lm_head."
_DECODER = "language_model."
_TOWER = "vision_tower."
_FIRST, _SECOND = "multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."

# Our prefix -> stored prefix. "hub": what llava-hf uploaded; "original": lmms-lab; the others: what these releases save.
_PREFIXES: dict[CheckpointLayout, dict[str, str]] = {
    "hub": {
        _DECODER: "language_model.model.",
        _HEAD: "language_model.lm_head.",
        _TOWER: "vision_tower.vision_model.",
        _FIRST: _FIRST,
        _SECOND: _SECOND,
    },
    "original": {
        _DECODER: "model.",
        _HEAD: _HEAD,
        _TOWER: "model.vision_tower.vision_tower.vision_model.",
        _FIRST: "model.mm_projector.0.",
        _SECOND: "model.mm_projector.2.",
    },
    "transformers-4.52": {
        _DECODER: "model.language_model.",
        _HEAD: _HEAD,
        _TOWER: "model.vision_tower.vision_model.",
        _FIRST: f"model.{_FIRST}",
        _SECOND: f"model.{_SECOND}",
    },
    "transformers-5": {
        _DECODER: "model.language_model.",
        _HEAD: _HEAD,
        _TOWER: "model.vision_tower.",
        _FIRST: f"model.{_FIRST}",
        _SECOND: f"model.{_SECOND}",
    },
}
_READ = sorted(
    ((stored, ours) for names in _PREFIXES.values() for ours, stored in names.items()),
    key=lambda pair: -len(pair[0]),
)


def ours(stored: str) -> str:
    """Our name of a stored tensor, whichever layout it comes from: the longest known prefix decides."""
    for prefix, mine in _READ:
        if stored.startswith(prefix):
            return mine + stored.removeprefix(prefix)
    return stored


def theirs(name: str, layout: CheckpointLayout) -> str:
    """The name under which our tensor `name` is stored in `layout`."""
    for mine, prefix in _PREFIXES[layout].items():
        if name.startswith(mine):
            return prefix + name.removeprefix(mine)
    raise AssertionError(name)


def unused(name: str, config: LlavaConfig) -> bool:
    """Whether a tensor that the network does not have may be in a checkpoint all the same."""
    if name.endswith(("image_newline", ".rotary_emb.inv_freq", ".embeddings.position_ids")):
        return True
    first = config.vision.num_layers
    spare = (
        f"{_TOWER}encoder.layers.{i}." for i in range(first, first + config.vision.spare_layers)
    )
    return name.startswith((f"{_TOWER}post_layernorm.", f"{_TOWER}head.", *spare))
