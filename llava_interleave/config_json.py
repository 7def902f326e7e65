"""config.json to `LlavaConfig` and back: every form of the family, strict. Knows no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import EfficientNetConfig, LlavaConfig, TextConfig, VisionConfig
from .errors import CheckpointError, OptionError
from .image_layout import INTERLEAVE, ONEVISION, Arrangement, Newline

QUANTIZATION, METHOD = "quantization_config", "llava-interleave"
"""The entry of config.json for quantized weights, and its `quant_method` for this package's own."""
_MAX_JSON = 64 << 20


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; {} for an `optional` file that does not exist.
    Raises `CheckpointError`."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes; at most {_MAX_JSON} are read"
            )
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        if optional:
            return {}
        raise CheckpointError(
            f"there is no {path.name} in {path.parent}; a checkpoint is a folder that holds one"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def from_dict(values: Mapping[str, Any]) -> LlavaConfig:
    """The network that a config.json describes: transformers' form of any release, or the original
    lmms-lab form.

    Absent keys mean what they mean to transformers. Keys without effect are ignored. An unknown key
    with a value, or a value of another network, raises `CheckpointError` with its name. The entry
    of this package's own quantization is left to `Checkpoint`.
    """
    if (
        isinstance(entry := values.get(QUANTIZATION), Mapping)
        and entry.get("quant_method") == METHOD
    ):
        values = {key: value for key, value in values.items() if key != QUANTIZATION}
    top = _Section("", values)
    return (
        _original(top)
        if "mm_projector_type" in values or "mm_vision_tower" in values
        else _hub(top)
    )


def to_dict(config: LlavaConfig, *, original: bool = False) -> dict[str, Any]:
    """The content of a config.json: transformers' spelling that every release since 4.39 reads, or
    the original form.

    A tower that is not so400m cannot be named in the original form; its sizes then stand in an own
    `vision_config`.
    """
    text, vision = config.text, config.vision
    decoder: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.context,
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_sliding_window": False,
        "vocab_size": text.vocab_size,
    }
    if text.head_dim * text.num_heads != text.hidden_size:
        decoder["head_dim"] = text.head_dim
    tower = _vision_dict(vision)
    if original:
        if not text.attention_bias:
            raise OptionError("the original layout has Qwen2 decoders only; use layout hub")
        if isinstance(vision, EfficientNetConfig):
            raise OptionError("the original layout has SigLIP towers only; use layout hub")
        own_tower = (
            {}
            if vision == VisionConfig()
            else {"vision_config": tower | {"num_hidden_layers": vision.num_layers + 1}}
        )
        return {
            "architectures": ["LlavaQwenForCausalLM"],
            "model_type": "llava_qwen",
            "image_token_index": config.image_token_id,
            "mm_hidden_size": vision.hidden_size,
            "mm_patch_merge_type": "flat",
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": f"google/{_SO400M}",
            **own_tower,
            **_arrangement_dict(config),
            **decoder,
        }
    hub = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": vision.grid**2,
        "image_token_index": config.image_token_id,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["Qwen2ForCausalLM" if text.attention_bias else "LlamaForCausalLM"],
            "model_type": "qwen2" if text.attention_bias else "llama",
            **({} if text.attention_bias else {"attention_bias": False, "mlp_bias": False}),
            **decoder,
        },
        "tie_word_embeddings": text.tie_word_embeddings,
        "vision_config": tower,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    if config.projector_size is not None:
        hub["projector_hidden_size"] = config.projector_size
    return hub | _onevision_dict(config) if config.arrangement.newline else hub


def _vision_dict(vision: VisionConfig | EfficientNetConfig) -> dict[str, Any]:
    if isinstance(vision, EfficientNetConfig):
        return {
            "depth_coefficient": vision.depth,
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "model_type": _EFFICIENTNET,
            "pool_size": vision.pool_size,
            "pool_stride": vision.pool_stride,
            "width_coefficient": vision.width,
        }
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "model_type": "siglip_vision_model",
        "num_attention_heads": vision.num_heads,
        "num_hidden_layers": vision.num_layers,
        "patch_size": vision.patch_size,
        "vision_use_head": False,
    }


def _arrangement_dict(config: LlavaConfig) -> dict[str, Any]:
    """What the original form says of an arrangement that is not Interleave's."""
    a, size = config.arrangement, config.vision.image_size
    if not a.newline:
        return {}
    position = next(name for name, newline in _NEWLINES.items() if newline == a.video_newline)
    return {
        "image_aspect_ratio": f"anyres_max_{a.max_tiles}",
        "image_grid_pinpoints": [[columns * size, rows * size] for columns, rows in a.pinpoints],
        "mm_newline_position": position,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "add_time_instruction": a.frame_times,
    }


def has_hub_form(config: LlavaConfig) -> bool:
    """Whether transformers' form can say the arrangement; it cannot say LLaVA-Video's."""
    a = config.arrangement
    return not a.newline or (a.video_newline == "end" and not a.frame_times)


def _onevision_dict(config: LlavaConfig) -> dict[str, Any]:
    """What transformers' form says of OneVision. Raises `CheckpointError` for LLaVA-Video."""
    a, size = config.arrangement, config.vision.image_size
    if not has_hub_form(config):
        raise CheckpointError(
            "LLaVA-Video ends rows of video frames with a newline, which transformers' form cannot "
            "say; write the layout original"
        )
    video = config.image_token_id + 1 if config.video_token_id is None else config.video_token_id
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_grid_pinpoints": [[rows * size, columns * size] for columns, rows in a.pinpoints],
        "use_image_newline_parameter": True,
        "video_token_index": video,
        "vision_aspect_ratio": f"anyres_max_{a.max_tiles}",
    }


Pinpoints = tuple[tuple[int, int], ...]
_GRIDS = r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)"
_NEWLINES: dict[object, Newline] = {
    "one_token": "end",
    "grid": "row",
    "frame": "frame",
    "no_token": "none",
}
"""mm_newline_position of the original's configs."""
_ONEVISION_TOKENS = (("image", 151646), ("video", 151647))
_EFFICIENTNET = "efficientnet_lite"
_SO400M = "siglip-so400m-patch14-384"
_TOWER_DEFAULTS = VisionConfig(768, 3072, 12, 12, 224, 16)  # transformers' SiglipVisionConfig
_LLAMA_DEFAULTS = TextConfig(  # transformers' LlamaConfig
    intermediate_size=11008, vocab_size=32000, context=2048, attention_bias=False
)

# Keys of transformers or the original trainer without effect on a forward pass. Generation settings
# are among them: generation_config.json and the tokenizer's special tokens decide.
_IGNORED_KEYS = frozenset(
    """ architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward
    diversity_penalty dtype early_stopping eos_token_id id2label ignore_index image_seq_length
    initializer_factor initializer_range label2id length_penalty max_length max_window_layers
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type projector_lr pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    sliding_window task_specific_params temperature tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache use_sliding_window
    vision_use_head """.split()  # noqa: SIM905
)
_IGNORED_KEYS_ORIGINAL = frozenset(
    """ delay_load faster_token_stride force_sample freeze_mm_mlp_adapter image_aspect_ratio
    image_crop_resolution image_grid_pinpoints image_split_resolution mm_newline_position
    mm_patch_merge_type mm_pooling_position mm_projector_lr mm_spatial_pool_mode
    mm_spatial_pool_stride mm_tunable_parts mm_vision_tower_lr modality_max_length
    pos_skipping_range tokenizer_model_max_length tokenizer_padding_side tune_mm_mlp_adapter
    unfreeze_mm_vision_tower use_mm_proj vision_tower_pretrained """.split()  # noqa: SIM905
)


class _Section:
    """One JSON object: its keys are taken one by one; `finish` refuses unknown ones."""

    def __init__(self, name: str, values: object) -> None:
        self.name = name
        if not isinstance(values, Mapping):
            raise CheckpointError(
                f"config.json: {name or 'the file'} must be a JSON object, not {_brief(values)}"
            )
        self.remaining = dict(values)
        if self.remaining.get("quantization_config"):
            raise self.wrong(
                "quantization_config",
                "is present: quantized tensors are not supported; use the unquantized checkpoint",
            )

    def wrong(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"config.json: {f'{self.name}.' if self.name else ''}{key} {what}")

    def integer(self, key: str, default: int | None, low: int = 1, high: int = 2**20) -> int:
        """The integer at `key`; absent or null means `default`; without a default the key must be
        there."""
        value = self.remaining.pop(key, None)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(key, f"must be an integer from {low} to {high}, not {_brief(value)}")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.remaining.pop(key, None)
        value = default if value is None else value
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < float("inf")
        ):
            raise self.wrong(key, f"must be a positive number, not {_brief(value)}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.remaining.pop(key, None)
        if value not in (None, False, True):
            raise self.wrong(key, f"must be true or false, not {_brief(value)}")
        return bool(value)

    def only(self, key: str, *allowed: object) -> None:
        """`key` must have one of the `allowed` values; absent is as good as the first of them."""
        value = self.remaining.pop(key, allowed[0])
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            raise self.wrong(
                key, f"is {_brief(value)}; this network has {' or '.join(map(repr, allowed))}"
            )

    def finish(self, ignored: frozenset[str]) -> None:
        for key, value in self.remaining.items():
            if value and key not in ignored and not key.startswith("_"):
                raise self.wrong(
                    key,
                    f"= {_brief(value)} is unknown here and may change results; delete the key if "
                    "it does not",
                )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _hub(top: _Section) -> LlavaConfig:
    onevision = top.remaining.get("model_type") == "llava_onevision"
    top.only("model_type", "llava", "llava_onevision")
    if "vision_config" not in top.remaining or "text_config" not in top.remaining:
        raise CheckpointError(
            "config.json describes no LLaVA network: it has neither vision_config and text_config "
            "nor mm_* keys"
        )
    top.only("projector_hidden_act", "gelu")
    top.only("multimodal_projector_bias", True)
    default = "full" if onevision else "default"
    if (strategy := top.remaining.pop("vision_feature_select_strategy", default)) != "full":
        raise top.wrong(
            "vision_feature_select_strategy",
            f"is {_brief(strategy)} (absent means 'default'); SigLIP has no class token: 'full'",
        )
    layer = top.integer("vision_feature_layer", -1 if onevision else -2, -1000, 1000)
    tower = _Section("vision_config", top.remaining.pop("vision_config"))
    vision: VisionConfig | EfficientNetConfig
    if not onevision and tower.remaining.get("model_type") == _EFFICIENTNET:
        vision = _efficientnet(tower)
    else:
        vision = _vision(tower, layer)
    decoder = _Section("text_config", top.remaining.pop("text_config"))
    # transformers reads a text_config without a model_type as Llama. No checkpoint of this family
    # is one, and a Llama's tensors, which have no q, k and v biases, would be refused when they are
    # loaded.
    attention_bias = _attention_bias(decoder)
    # As transformers: true in either place ties. Releases before 5 wrote the outer key only where
    # it was not their default.
    text = _text(decoder, tied=top.flag("tie_word_embeddings"), attention_bias=attention_bias)
    decoder.finish(_IGNORED_KEYS)
    if onevision:
        aspect = top.remaining.pop("vision_aspect_ratio", "anyres_max_9")
        arrangement = replace(
            ONEVISION,
            pinpoints=_pinpoints(top, vision.image_size, height_first=True),
            max_tiles=_max_tiles(top, "vision_aspect_ratio", aspect),
        )
        top.only("use_image_newline_parameter", True)
        image, video = (_token(top, text, kind, n) for kind, n in _ONEVISION_TOKENS)
        config = LlavaConfig(vision, text, image, arrangement, video)
    else:
        projector_size = None
        if top.remaining.get("projector_hidden_size") is not None:
            projector_size = top.integer("projector_hidden_size", None)
        image = _token(top, text, "image", None)
        config = LlavaConfig(vision, text, image, projector_size=projector_size)
    top.finish(_IGNORED_KEYS)
    return config


def _original(top: _Section) -> LlavaConfig:
    top.only("model_type", "llava_qwen", "llava", "qwen2")
    top.only("mm_projector_type", "mlp2x_gelu")
    # The original code always removes the last of 27 layers, which is what -2 says; other values
    # say something it never did.
    top.only("mm_vision_select_layer", -2)
    top.only("mm_vision_select_feature", "patch")
    top.only("mm_resampler_type", None)
    tower = top.remaining.pop("mm_vision_tower", None)
    if not isinstance(tower, str) or _SO400M not in tower:
        raise top.wrong(
            "mm_vision_tower", f"is {_brief(tower)}; this network has 'google/{_SO400M}'"
        )
    own_tower = top.remaining.pop("vision_config", None)
    # LLaVA-Video 72B once carried sub-configs of other networks, which its code never read.
    if isinstance(own_tower, Mapping) and own_tower.get("model_type") == "clip_vision_model":
        own_tower = None
    decoder = top.remaining.get("text_config")
    if isinstance(decoder, Mapping) and decoder.get("model_type") == "llama":
        del top.remaining["text_config"]
    vision = (
        VisionConfig(spare_layers=1)
        if own_tower is None
        else _vision(_Section("vision_config", own_tower), -2)
    )
    if (width := top.integer("mm_hidden_size", vision.hidden_size)) != vision.hidden_size:
        raise top.wrong(
            "mm_hidden_size", f"is {width}, but the tower's width is {vision.hidden_size}"
        )
    text = _text(top, tied=False, attention_bias=True)
    # The original puts -200 where an image goes and has no token for it; its Hugging Face
    # conversion took the first free id.
    arrangement = _original_arrangement(top, vision, text)
    config = LlavaConfig(vision, text, _token(top, text, "image", 151646), arrangement)
    top.finish(_IGNORED_KEYS | _IGNORED_KEYS_ORIGINAL)
    return config


def _pinpoints(top: _Section, size: int, *, height_first: bool) -> Pinpoints:
    """image_grid_pinpoints as (columns, rows) of tiles: a list of pairs in pixels, or the original
    trainer's "(1x1),...,(6x6)", which is all grids between the two."""
    value = top.remaining.pop("image_grid_pinpoints", None)
    if value is None:
        return ONEVISION.pinpoints
    if isinstance(value, str) and (ends := re.fullmatch(_GRIDS, value)):
        a, b, c, d = map(int, ends.groups())
        if 1 <= a <= c <= 64 and 1 <= b <= d <= 64:
            return tuple((i, j) for j in range(b, d + 1) for i in range(a, c + 1))
    pairs = value if isinstance(value, list) else []
    whole = [
        pair
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)
    ]
    if not pairs or len(whole) != len(pairs) or any(n < size or n % size for p in whole for n in p):
        raise top.wrong(
            "image_grid_pinpoints",
            f"is {_brief(value)}; this network has pairs of multiples of its image size {size}",
        )
    tiles = [(a // size, b // size) for a, b in whole]
    grids = [(b, a) if height_first else (a, b) for a, b in tiles]
    return tuple(sorted(grids, key=lambda grid: grid[::-1]))  # their order decides nothing


def _max_tiles(top: _Section, key: str, aspect: object) -> int:
    """N of anyres_max_N."""
    match = re.fullmatch(r"anyres_max_([1-9]\d{0,2})", aspect) if isinstance(aspect, str) else None
    if match is None:
        raise top.wrong(key, f"is {_brief(aspect)}; this network has 'anyres_max_N'")
    return int(match[1])


def _original_arrangement(top: _Section, vision: VisionConfig, text: TextConfig) -> Arrangement:
    """OneVision's or LLaVA-Video's where image_aspect_ratio is anyres_max_N, else Interleave's.

    Interleave's own config says anyres and spatial_unpad, but its code writes no newlines. A
    decoder with GQA (Qwen2) is of the later code, which does: with one, whatever asks for newlines
    or pooled frames is refused.
    """
    aspect, position = (
        top.remaining.get("image_aspect_ratio"),
        top.remaining.get("mm_newline_position"),
    )
    if not (isinstance(aspect, str) and aspect.startswith("anyres_max_")):
        later = text.num_kv_heads != text.num_heads
        merge = top.remaining.get("mm_patch_merge_type")
        for key, wrong in (
            ("mm_newline_position", later or position in ("grid", "frame")),
            ("mm_spatial_pool_stride", later),
            ("mm_spatial_pool_mode", later),
            ("mm_patch_merge_type", later and merge != "flat"),
        ):
            if wrong and (value := top.remaining.get(key)):
                raise top.wrong(
                    key,
                    f"is {_brief(value)}, of LLaVA-OneVision or LLaVA-Video, but "
                    f"image_aspect_ratio is {_brief(aspect)}; supported with 'anyres_max_N', or "
                    "without newlines and pooling: mm_patch_merge_type 'flat' and no such key",
                )
        pinpoints = INTERLEAVE.pinpoints
        if aspect == "anyres" and top.remaining.get("image_grid_pinpoints") is not None:
            pinpoints = _pinpoints(top, vision.image_size, height_first=False)
        if set(pinpoints) == set(INTERLEAVE.pinpoints):
            return INTERLEAVE
        return replace(INTERLEAVE, pinpoints=pinpoints)
    newline = _NEWLINES.get(position or "one_token")
    if newline is None:
        raise top.wrong("mm_newline_position", f"is {_brief(position)}, not of {list(_NEWLINES)}")
    if top.remaining.get("mm_patch_merge_type") is None:  # the original code then has no newlines
        raise top.wrong("mm_patch_merge_type", "is missing; this network has 'spatial_unpad'")
    top.only("mm_patch_merge_type", "spatial_unpad")
    top.only("mm_spatial_pool_mode", "bilinear")
    top.only("mm_spatial_pool_stride", 2)
    top.only("add_faster_video", False)
    top.only("use_pos_skipping", False)
    return replace(
        ONEVISION,
        pinpoints=_pinpoints(top, vision.image_size, height_first=False),
        max_tiles=_max_tiles(top, "image_aspect_ratio", aspect),
        video_newline=newline,
        num_frames=64 if newline == "row" else 32,
        frame_times=top.flag("add_time_instruction"),
    )


def _token(top: _Section, text: TextConfig, kind: str, default: int | None) -> int:
    """The id of the `kind` of placeholder: image or video."""
    ids = {
        key: value
        for key in (f"{kind}_token_index", f"{kind}_token_id")
        if (value := top.remaining.get(key)) is not None
    }
    if len(set(map(repr, ids.values()))) > 1:
        raise top.wrong(
            f"{kind}_token_index", f"and {kind}_token_id contradict each other: {_brief(ids)}"
        )
    name = next(iter(ids), f"{kind}_token_index")
    number = top.integer(name, default, 0, 2**31)
    top.remaining.pop(f"{kind}_token_id", None)
    if number >= text.vocab_size:
        raise top.wrong(name, f"is {number}, outside the vocabulary of {text.vocab_size}")
    return number


def _efficientnet(s: _Section) -> EfficientNetConfig:
    d = EfficientNetConfig()
    s.only("model_type", _EFFICIENTNET)
    vision = EfficientNetConfig(
        hidden_size=s.integer("hidden_size", d.hidden_size),
        image_size=s.integer("image_size", d.image_size, high=2**14),
        width=s.positive("width_coefficient", d.width),
        depth=s.positive("depth_coefficient", d.depth),
        pool_size=s.integer("pool_size", d.pool_size),
        pool_stride=s.integer("pool_stride", d.pool_stride),
    )
    if max(vision.width, vision.depth) > 10:
        raise s.wrong("width_coefficient", "and depth_coefficient must be at most 10")
    if vision.pool_size > -(-vision.image_size // 32):
        raise s.wrong(
            "pool_size",
            f"is {vision.pool_size}, larger than the map of the {vision.image_size} "
            "pixels of image_size",
        )
    s.finish(_IGNORED_KEYS)
    return vision


def _vision(s: _Section, feature_layer: int) -> VisionConfig:
    s.only("model_type", "siglip_vision_model")
    s.only("hidden_act", "gelu_pytorch_tanh")
    s.only("num_channels", 3)
    d = _TOWER_DEFAULTS
    layers = s.integer("num_hidden_layers", d.num_layers, high=1000)
    # hidden_states of transformers: the embeddings, then each layer's output, the last one before
    # post_layernorm.
    used = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 1 <= used <= layers:
        raise CheckpointError(
            f"config.json: vision_feature_layer {feature_layer} takes {used} of the tower's "
            f"{layers} layers"
        )
    vision = VisionConfig(
        hidden_size=s.integer("hidden_size", d.hidden_size),
        intermediate_size=s.integer("intermediate_size", d.intermediate_size),
        num_layers=used,
        num_heads=s.integer("num_attention_heads", d.num_heads),
        image_size=s.integer("image_size", d.image_size, high=2**14),
        patch_size=s.integer("patch_size", d.patch_size),
        layer_norm_eps=s.positive("layer_norm_eps", d.layer_norm_eps),
        spare_layers=layers - used,
    )
    if vision.hidden_size % vision.num_heads:
        raise s.wrong(
            "hidden_size",
            f"is {vision.hidden_size}, not a multiple of num_attention_heads = {vision.num_heads}",
        )
    if vision.image_size < vision.patch_size:
        raise s.wrong(
            "patch_size", f"is {vision.patch_size}, larger than image_size = {vision.image_size}"
        )
    s.finish(_IGNORED_KEYS)
    return vision


def text_from_dict(values: Mapping[str, Any]) -> TextConfig:
    """The shape of a decoder alone, from its config.json: Qwen2ForCausalLM or LlamaForCausalLM."""
    s = _Section("", values)
    if s.remaining.get("model_type") is None:
        raise s.wrong("model_type", "is missing; a decoder is 'qwen2' or 'llama'")
    text = _text(s, tied=False, attention_bias=_attention_bias(s))
    s.finish(_IGNORED_KEYS | {"is_llama_config", "rope_interleaved", "transformers.js_config"})
    return text


def vision_from_dict(values: Mapping[str, Any], layers: int | None = None) -> VisionConfig:
    """The shape of a tower alone, from the config.json of a SiglipVisionModel or a SiglipModel.

    layers: how many of its layers are used; None: all but the last, as in LLaVA.
    """
    s = _Section("", values)
    s.only("model_type", "siglip_vision_model", "siglip")
    if "vision_config" in s.remaining:
        s = _Section("vision_config", s.remaining["vision_config"])
    return _vision(s, -2 if layers is None else layers)


def _attention_bias(s: _Section) -> bool:
    """Whether q, k and v have biases: Qwen2's have, Llama's have not. Without a model type:
    Qwen2."""
    llama = s.remaining.get("model_type") == "llama"
    s.only("model_type", "qwen2", "llama")
    if llama:
        s.only("attention_bias", False)
        s.only("mlp_bias", False)
        s.only("pretraining_tp", 1)
    return not llama


def _text(s: _Section, *, tied: bool, attention_bias: bool) -> TextConfig:
    d = TextConfig() if attention_bias else _LLAMA_DEFAULTS
    s.only("hidden_act", "silu")
    s.only("partial_rotary_factor", 1.0, None)
    layers = s.integer("num_hidden_layers", d.num_layers, high=1000)
    heads = s.integer("num_attention_heads", d.num_heads)
    # Null means "as many as heads", absent means 32: so does Qwen2Config.
    kv_absent = d.num_kv_heads if "num_key_value_heads" not in s.remaining else heads
    if not attention_bias:
        kv_absent = heads
    hidden = s.integer("hidden_size", d.hidden_size)
    if s.remaining.get("head_dim") is None and hidden % heads:
        raise s.wrong(
            "hidden_size", f"is {hidden}, not a multiple of num_attention_heads = {heads}"
        )
    text = TextConfig(
        hidden_size=hidden,
        intermediate_size=s.integer("intermediate_size", d.intermediate_size),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=s.integer("num_key_value_heads", kv_absent),
        head_dim=s.integer("head_dim", hidden // heads),
        vocab_size=s.integer("vocab_size", d.vocab_size, high=2**31),
        context=s.integer("max_position_embeddings", d.context, high=2**31),
        rope_theta=_rope_theta(s, d.rope_theta),
        rms_norm_eps=s.positive("rms_norm_eps", d.rms_norm_eps),
        tie_word_embeddings=s.flag("tie_word_embeddings") or tied,
        attention_bias=attention_bias,
    )
    if heads % text.num_kv_heads:
        raise s.wrong(
            "num_key_value_heads",
            f"is {text.num_kv_heads}, which does not divide num_attention_heads = {heads}",
        )
    if text.head_dim % 2:
        raise s.wrong("head_dim", f"is {text.head_dim}; rotary embeddings need an even number")
    kinds = s.remaining.pop("layer_types", None) or []
    first = s.remaining.get("max_window_layers", 28)
    window = (
        s.remaining.get("sliding_window", 4096) if s.remaining.get("use_sliding_window") else None
    )
    if set(kinds) - {"full_attention"} or (
        not kinds and window is not None and isinstance(first, int) and first < layers
    ):
        raise s.wrong(
            "use_sliding_window",
            "or layer_types asks for sliding attention, which no checkpoint of this family has",
        )
    return text


def _rope_theta(s: _Section, default: float) -> float:
    """The rotary base, from `rope_theta`, `rope_parameters` (transformers 5) or a `rope_scaling`
    that scales nothing."""
    outer = s.remaining.get("rope_theta")
    theta = s.positive("rope_theta", default)
    for key in ("rope_parameters", "rope_scaling"):
        if (inner := s.remaining.pop(key, None)) is None:
            continue
        rope = _Section(f"{s.name}.{key}" if s.name else key, inner)
        rope.only("rope_type", "default")
        rope.only("type", "default")
        rope.only("partial_rotary_factor", 1.0, None)
        inner_theta = rope.positive("rope_theta", theta)
        if outer is not None and inner_theta != theta:
            raise s.wrong(
                "rope_theta",
                f"is {theta}, but {key}.rope_theta is {inner_theta}: they contradict each other",
            )
        outer, theta = inner_theta, inner_theta
        rope.finish(frozenset())
    return theta
