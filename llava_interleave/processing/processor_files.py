"""The files of a checkpoint for text, pixels and generation, for a checkpoint that is made."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ..config import EfficientNetConfig, LlavaConfig
from ..config_json import has_hub_form, read_json
from .tokenizer import END_OF_TEXT, IM_END, IM_START, IMAGE, VIDEO, Tokenizer

SPECIAL = (END_OF_TEXT, IM_START, IM_END, IMAGE)
# Source: chat_template.json of llava-hf/llava-interleave-qwen-0.5b-hf.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}{# Render all "
    "images first #}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{# "
    "Render all text next #}{% if "
    "message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', "
    "'equalto', 'text') %}{{ '\\n' + "
    "content['text'] }}{% endfor %}{% else %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{% "
    "generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif "
    "%}{{'<|im_end|>' + '\\n'}}{% endfor %}{% "
    "if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Source: chat_template.json of llava-hf/llava-onevision-qwen2-0.5b-ov-hf.
ONEVISION_TEMPLATE = (
    CHAT_TEMPLATE.replace("'\\n' + content", "'\n' + content")
    .replace("assistant\\n", "assistant\n")
    .replace("message['role'] + '\\n'", "message['role'] + ' '")
    .replace("'<|im_end|>' + '\\n'", "'<|im_end|>'")
    .replace(
        "{# Render all text next #}",
        "{# Render all video then #}{% for content in message['content'] | selectattr('type', "
        "'equalto', 'video') %}{{ '<video>' }}{% endfor %}{# Render all text next #}",
    )
)


EFFICIENTNET_MEAN, EFFICIENTNET_STD = 127 / 255, 128 / 255
"""MEAN_RGB and STDDEV_RGB of efficientnet_lite_builder.py in github.com/tensorflow/tpu."""


def processor_files(
    folder: str | Path,
    config: LlavaConfig,
    tokenizer: Backend,
    tokenizer_class: str = "Qwen2Tokenizer",
) -> None:
    """Write a checkpoint's files of tokenizer, image processor, chat template and generation.

    They are those that the published checkpoints have. tokenizer_class: of transformers.
    """
    folder = Path(folder)
    found = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    ids = {token: number for token, number in found.items() if number is not None}
    end_of_text = END_OF_TEXT if END_OF_TEXT in ids else IM_END
    added = tokenizer.get_added_tokens_decoder()
    assert ids[IMAGE] == config.image_token_id, (ids, config.image_token_id)
    onevision = config.arrangement.newline
    size = {"height": config.vision.image_size, "width": config.vision.image_size}
    mean, std = (0.5, 0.5)
    if isinstance(config.vision, EfficientNetConfig):
        mean, std = EFFICIENTNET_MEAN, EFFICIENTNET_STD
    sides = config.arrangement.pinpoints
    pinpoints = [[rows * size["height"], columns * size["width"]] for columns, rows in sides]
    tokenizer.save(str(folder / "tokenizer.json"))
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(number): {
                    "content": token.content,
                    "lstrip": token.lstrip,
                    "normalized": token.normalized,
                    "rstrip": token.rstrip,
                    "single_word": token.single_word,
                    "special": token.special,
                }
                for number, token in sorted(added.items())
            },
            "additional_special_tokens": [IM_START, IM_END],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": IM_END,
            "errors": "replace",
            "model_max_length": config.text.context,
            "pad_token": end_of_text,
            "padding_side": "right",
            "processor_class": "LlavaProcessor",
            "split_special_tokens": False,
            "tokenizer_class": tokenizer_class,
            "unk_token": None,
        },
        "preprocessor_config.json": {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [mean] * 3,
            "image_processor_type": f"{'LlavaOnevision' if onevision else 'Siglip'}ImageProcessor",
            "image_std": [std] * 3,
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": size,
            **({"do_pad": True, "image_grid_pinpoints": pinpoints} if onevision else {}),
        },
        "processor_config.json": {
            "image_token": IMAGE,
            **(
                {"num_image_tokens": config.vision.grid**2, "video_token": VIDEO}
                if onevision
                else {"num_additional_image_tokens": 0, "patch_size": config.vision.patch_size}
            ),
            "processor_class": "LlavaOnevisionProcessor" if onevision else "LlavaProcessor",
            "vision_feature_select_strategy": "full",
        },
        "chat_template.json": {"chat_template": ONEVISION_TEMPLATE if onevision else CHAT_TEMPLATE},
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": ids[end_of_text],
            "eos_token_id": ids[IM_END],
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")


@contextmanager
def files_for_transformers(
    folder: Path, config: LlavaConfig, template: str | None = None
) -> Iterator[Path]:
    """`folder`, or for one of lmms-lab a temporary copy of its files of text, pixels and generation
    with what transformers wants besides: placeholders in the tokenizer, a chat template (default:
    the published conversion's), processor_config.json.
    """
    if (folder / "processor_config.json").is_file() or not has_hub_form(config):
        yield folder
        return
    video = config.image_token_id + 1 if config.arrangement.newline else None
    tokenizer = Tokenizer.from_folder(folder, config.image_token_id, video)
    with tempfile.TemporaryDirectory() as scratch:
        new = Path(scratch)
        processor_files(new, replace(config, video_token_id=video), tokenizer.backend)
        made, own = (read_json(path / "preprocessor_config.json") for path in (new, folder))
        kept = {key: own[key] for key in ("image_mean", "image_std", "size") if key in own}
        (new / "preprocessor_config.json").write_text(json.dumps(made | kept), "utf-8")
        if template is not None:
            text = json.dumps({"chat_template": template})
            (new / "chat_template.json").write_text(text, "utf-8")
        for name in ("generation_config.json", "chat_template.jinja", "chat_template.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, new / name)
        yield new
