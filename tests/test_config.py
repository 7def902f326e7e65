"""config.json in every form of the family, held against transformers' own reading of it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import transformers

from llava_interleave import config_json
from llava_interleave.checkpoints import meta_network
from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig
from llava_interleave.config_json import read_json
from llava_interleave.errors import CheckpointError
from llava_interleave.testing import tiny_config

TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "layer_norm_eps": 1e-06,
    "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": False,
}
HALF_B: dict[str, Any] = {  # llava-hf/llava-interleave-qwen-0.5b-hf
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 151646,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "Qwen/Qwen1.5-0.5B-Chat",
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152000,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "vision_config": TOWER,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
SEVEN_B = HALF_B | {  # llava-hf/llava-interleave-qwen-7b-hf: most sizes are Qwen2Config's defaults
    "text_config": {
        "_name_or_path": "Qwen/Qwen1.5-7B-Chat",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "intermediate_size": 11008,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 152000,
    },
}
ORIGINAL: dict[str, Any] = {  # lmms-lab/llava-next-interleave-qwen-0.5b
    "_name_or_path": "somewhere_finetune",
    "architectures": ["LlavaQwenForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
    "image_split_resolution": 224,
    "initializer_range": 0.02,
    "intermediate_size": 2816,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "mm_hidden_size": 1152,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_tunable_parts": "mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_tower_lr": None,
    "model_type": "llava",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.0.dev0",
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
TEXT_HALF_B = TextConfig(1024, 2816, 24, 16, 16, 64, 152000, 32768, 1e6, 1e-6, True)


def changed(base: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of `base` with the key at a dotted path set, or deleted where `value` is the word
    'absent'.
    """
    values = copy.deepcopy(base)
    *sections, key = path.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    if value == "absent":
        del inner[key]
    else:
        inner[key] = value
    return values


def theirs(values: dict[str, Any]) -> LlavaConfig:
    """Our config with every number taken from transformers' reading of the same file."""
    hf = transformers.LlavaConfig.from_dict(copy.deepcopy(values))
    v, t = hf.vision_config, hf.text_config
    head_dim = getattr(t, "head_dim", None) or t.hidden_size // t.num_attention_heads
    return LlavaConfig(
        VisionConfig(
            v.hidden_size,
            v.intermediate_size,
            v.num_hidden_layers,
            v.num_attention_heads,
            v.image_size,
            v.patch_size,
            v.layer_norm_eps,
        ),
        TextConfig(
            t.hidden_size,
            t.intermediate_size,
            t.num_hidden_layers,
            t.num_attention_heads,
            t.num_key_value_heads,
            head_dim,
            t.vocab_size,
            t.max_position_embeddings,
            t.rope_parameters["rope_theta"],
            t.rms_norm_eps,
            hf.tie_word_embeddings,
        ),
        hf.image_token_id,
    )


def test_half_b() -> None:
    ours = config_json.from_dict(HALF_B)
    assert ours == LlavaConfig(VisionConfig(), TEXT_HALF_B) == theirs(HALF_B)
    assert ours.vision.grid**2 == 729


def test_seven_b_sizes_come_from_defaults() -> None:
    ours = config_json.from_dict(SEVEN_B)
    assert ours.text == TextConfig(4096, 11008, 32, 32, 32, 128, 152000, 32768, 1e6, 1e-6, False)
    assert ours == theirs(SEVEN_B)
    assert config_json.from_dict(changed(SEVEN_B, "text_config.model_type", "absent")) == ours


def test_all_defaults_are_transformers() -> None:
    bare = HALF_B | {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    bare["image_token_index"] = 7
    assert config_json.from_dict(bare) == theirs(bare)
    assert config_json.from_dict(bare).text == TextConfig()


@pytest.mark.parametrize("values", [HALF_B, SEVEN_B], ids=["0.5b", "7b"])
def test_transformers_5_spelling(values: dict[str, Any]) -> None:
    """What transformers 5 writes for the same network: rope_parameters, layer_types, dtype, and all
    keys with their defaults.
    """
    written = transformers.LlavaConfig.from_dict(copy.deepcopy(values)).to_dict()
    assert "rope_parameters" in written["text_config"]
    assert config_json.from_dict(written) == config_json.from_dict(values)
    renamed = {k: v for k, v in written.items() if k != "image_token_index"} | {
        "image_token_id": 151646
    }
    assert config_json.from_dict(renamed) == config_json.from_dict(values)


def test_original() -> None:
    ours = config_json.from_dict(ORIGINAL)
    assert ours.text == TextConfig(1024, 2816, 24, 16, 16, 64, 151936, 32768, 1e6, 1e-6, True)
    assert (ours.vision, ours.vision.spare_layers, ours.image_token_id) == (
        VisionConfig(),
        1,
        151646,
    )


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        config_json.from_dict(HALF_B),
        config_json.from_dict(SEVEN_B),
        tiny_config(text={"head_dim": 20, "num_kv_heads": 2}),
    ],
    ids=["0.5b", "7b", "tiny"],
)
def test_written_is_read(config: LlavaConfig, original: bool) -> None:
    written = config_json.to_dict(config, original=original)
    assert config_json.from_dict(written) == config
    if not original:
        assert theirs(written) == config


@pytest.mark.parametrize(
    ("layer", "used"), [(-1, 27), (-2, 26), (-27, 1), (1, 1), (26, 26), (27, 27)]
)
def test_feature_layer_is_a_number_of_layers(layer: int, used: int) -> None:
    values = changed(
        HALF_B | {"vision_feature_layer": layer}, "vision_config.num_hidden_layers", 27
    )
    vision = config_json.from_dict(values).vision
    assert (vision.num_layers, vision.spare_layers) == (used, 27 - used)


def test_tied_where_either_place_says_so() -> None:
    """A file saved by transformers 4 says false outside, which is only that class's default, and
    true inside.
    """
    for outer, inner, tied in [
        (False, True, True),
        (True, False, True),
        (False, False, False),
        ("absent", True, True),
    ]:
        values = changed(
            HALF_B | {"tie_word_embeddings": False}, "text_config.tie_word_embeddings", inner
        )
        assert (
            config_json.from_dict(
                changed(values, "tie_word_embeddings", outer)
            ).text.tie_word_embeddings
            is tied
        )


def test_kv_heads_null_or_absent() -> None:
    """Null means as many as heads; absent means 32, as Qwen2Config has it, which cannot be with 16
    heads.
    """
    null = config_json.from_dict(changed(HALF_B, "text_config.num_key_value_heads", None))
    assert null.text.num_kv_heads == 16
    with pytest.raises(CheckpointError, match="num_key_value_heads is 32"):
        config_json.from_dict(changed(HALF_B, "text_config.num_key_value_heads", "absent"))


REFUSED = [
    ("model_type", "llava_next", "model_type is 'llava_next'"),
    ("text_config.model_type", "mistral", "text_config.model_type is 'mistral'"),
    ("text_config", "absent", "text_config"),
    ("text_config", [1], "text_config must be a JSON object"),
    ("vision_config.model_type", "clip_vision_model", "clip_vision_model"),
    ("vision_config.hidden_act", "quick_gelu", "vision_config.hidden_act is 'quick_gelu'"),
    ("vision_config.num_channels", 1, "num_channels"),
    ("vision_config.image_size", [384, 384], "image_size must be an integer"),
    ("vision_config.patch_size", 385, "patch_size is 385"),
    ("vision_config.num_attention_heads", 7, "not a multiple"),
    ("text_config.hidden_act", "relu", "text_config.hidden_act is 'relu'"),
    ("text_config.hidden_size", "1024", "hidden_size must be an integer"),
    ("text_config.hidden_size", 1001, "not a multiple"),
    ("text_config.head_dim", 63, "head_dim"),
    ("text_config.num_key_value_heads", 5, "does not divide"),
    ("text_config.rms_norm_eps", -1, "positive number"),
    ("text_config.num_hidden_layers", 10**9, "num_hidden_layers"),
    ("text_config.use_sliding_window", True, "sliding attention"),
    ("text_config.layer_types", ["sliding_attention"] * 24, "sliding attention"),
    ("text_config.rope_scaling", {"type": "yarn", "factor": 4.0}, "rope_scaling.type is 'yarn'"),
    ("text_config.rope_scaling", {"type": "default", "factor": 4.0}, "factor"),
    (
        "text_config.rope_parameters",
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
        "rope_type is 'linear'",
    ),
    ("text_config.rope_parameters", {"rope_type": "default", "rope_theta": 1e4}, "contradict"),
    ("text_config.attention_bias", True, "attention_bias = True is unknown"),
    ("text_config.num_experts", 8, "num_experts"),
    ("quantization_config", {"load_in_4bit": True}, "quantization_config is present"),
    ("text_config.quantization_config", {"bits": 4}, "quantization_config is present"),
    ("projector_hidden_act", "relu", "projector_hidden_act"),
    ("multimodal_projector_bias", False, "multimodal_projector_bias"),
    ("vision_feature_select_strategy", "default", "vision_feature_select_strategy is 'default'"),
    ("vision_feature_select_strategy", "absent", "absent means 'default'"),
    ("vision_feature_layer", [-2, -1], "vision_feature_layer must be an integer"),
    ("vision_feature_layer", 27, "takes 27 of the tower's 26 layers"),
    ("vision_feature_layer", -28, "takes -1 of the tower's 26 layers"),
    (
        "vision_feature_layer",
        0,
        "takes 0 of the tower's 26 layers",
    ),  # transformers 5.23 itself fails on it
    ("image_token_index", "absent", "image_token_index must be an integer"),
    ("image_token_index", 152000, "outside the vocabulary"),
    ("image_token_id", 5, "contradict"),
    ("image_grid_pinpoints", [[336, 672]], "image_grid_pinpoints"),
]
REFUSED_ORIGINAL = [
    ("mm_vision_tower", "openai/clip-vit-large-patch14-336", "mm_vision_tower is"),
    ("mm_projector_type", "linear", "mm_projector_type is 'linear'"),
    ("mm_vision_select_layer", -1, "mm_vision_select_layer is -1"),
    ("mm_vision_select_feature", "cls_patch", "mm_vision_select_feature"),
    ("mm_resampler_type", "perceiver", "mm_resampler_type"),
    ("mm_use_im_start_end", True, "mm_use_im_start_end"),
    ("mm_hidden_size", 1024, "mm_hidden_size is 1024"),
    ("model_type", "llava_mistral", "llava_mistral"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling.type"),
]


@pytest.mark.parametrize(
    ("base", "path", "value", "message"),
    [(HALF_B, *case) for case in REFUSED] + [(ORIGINAL, *case) for case in REFUSED_ORIGINAL],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_by_name(base: dict[str, Any], path: str, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_json.from_dict(changed(base, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (
            "image_seq_length",
            576,
        ),  # the wrong default of transformers' class, which many re-saved files hold
        ("_commit_hash", "abc"),
        ("auto_map", {"AutoModel": "evil.Model"}),  # never followed
        ("text_config.use_cache", False),
        ("text_config.rope_scaling", None),
        ("text_config.rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
        ("text_config.layer_types", ["full_attention"] * 24),
        ("text_config.use_sliding_window", False),
        ("text_config.head_dim", None),
        ("text_config.id2label", {"0": "LABEL_0"}),
        ("text_config.some_future_switch", False),
        ("vision_config.attention_dropout", 0.0),
        ("vision_config.torch_dtype", "float16"),
    ],
)
def test_harmless_keys_change_nothing(path: str, value: object) -> None:
    assert config_json.from_dict(changed(HALF_B, path, value)) == config_json.from_dict(HALF_B)


def test_plain_language_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="model_type is 'qwen2'"):
        config_json.from_dict(HALF_B["text_config"])


def test_a_file_that_holds_no_json_object_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    assert read_json(file, optional=True) == {}
    with pytest.raises(CheckpointError, match="there is no config"):
        read_json(file)
    for written, says in (
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must hold a JSON object"),
    ):
        file.write_text(written)
        with pytest.raises(CheckpointError, match=says):
            read_json(file, optional=True)
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}


def test_a_llama_shaped_decoder_has_no_biases() -> None:
    """Its defaults are LlamaConfig's; biases, which are possible there, are refused."""
    llama = changed(HALF_B, "text_config", {"model_type": "llama", "hidden_size": 2048})
    llama["image_token_index"] = 31999
    text, theirs = config_json.from_dict(llama).text, transformers.LlamaConfig(hidden_size=2048)
    assert not text.attention_bias
    assert (text.intermediate_size, text.num_layers, text.num_heads, text.num_kv_heads) == (
        theirs.intermediate_size,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    assert (text.vocab_size, text.context) == (theirs.vocab_size, theirs.max_position_embeddings)
    for key in ("attention_bias", "mlp_bias"):
        with pytest.raises(CheckpointError, match=f"text_config.{key} is True"):
            config_json.from_dict(changed(llama, f"text_config.{key}", True))


@pytest.mark.parametrize("tied", [True, False])
def test_num_parameters_are_those_of_the_network(tied: bool) -> None:
    text = {"num_kv_heads": 2, "head_dim": 24, "tie_word_embeddings": tied}
    config = tiny_config(vision={"patch_size": 5}, text=text)
    network = meta_network(config)
    assert config.num_parameters == sum(p.numel() for p in network.parameters())
