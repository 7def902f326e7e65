"""Calls from transformers' documentation, made by its own classes and by `llava_interleave.hf`.

Every call gives the same result, or an error of the same type.
"""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from llava_interleave import hf
from llava_interleave.testing import tiny_checkpoint

pytestmark = pytest.mark.slow

Call = Callable[["World"], Any]
CALLS: dict[str, Call] = {}


@dataclass
class World:
    """One library with a tiny checkpoint and three images."""

    lib: Any
    folder: Path
    images: list[Path]
    scratch: Path
    loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """A model that the calls leave as it is."""
        if "model" not in self.loaded:
            self.loaded["model"] = self.fresh()
        return self.loaded["model"]

    @property
    def processor(self) -> Any:
        if "processor" not in self.loaded:
            self.loaded["processor"] = self.lib.AutoProcessor.from_pretrained(self.folder)
        return self.loaded["processor"]

    def fresh(self, **kwargs: Any) -> Any:
        """A model of one's own. Ids beyond the tokenizer's have no meaning and are suppressed."""
        kwargs = {"dtype": torch.float32} | kwargs
        model = self.lib.LlavaForConditionalGeneration.from_pretrained(self.folder, **kwargs)
        ids = range(model.config.image_token_id, model.config.text_config.vocab_size)
        model.generation_config.suppress_tokens = list(ids)
        return model

    def image(self, number: int = 0) -> Image.Image:
        return Image.open(self.images[number]).convert("RGB")

    def text(self, question: str = "What is it?", images: int = 1) -> str:
        return (
            f"<|im_start|>user\n{'<image>' * images}\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )

    def inputs(self, images: int = 1, **kwargs: Any) -> Any:
        media = [self.image(number) for number in range(images)] or None
        return self.processor(
            images=media, text=self.text(images=images), return_tensors="pt", **kwargs
        )

    def batch(self, side: str = "left") -> Any:
        """Two prompts of different lengths, one with one image and one with two."""
        return self.processor(
            images=[[self.image(0)], [self.image(1), self.image(2)]],
            text=[self.text(), self.text("A longer question: what differs?", 2)],
            return_tensors="pt",
            padding=True,
            padding_side=side,
        )

    def chat(self, **part: Any) -> list[dict[str, Any]]:
        part = part or {"image": self.image()}
        content = [{"type": "image", **part}, {"type": "text", "text": "What is it?"}]
        return [{"role": "user", "content": content}]

    def labels(self) -> Any:
        inputs = self.inputs()
        labels = inputs["input_ids"].clone()
        labels[labels == self.model.config.image_token_id] = -100
        return {**inputs, "labels": labels}


def call(name: str, do: Call) -> None:
    assert name not in CALLS
    CALLS[name] = do


def plain(value: Any) -> Any:
    """A result as numbers, strings and lists, whichever library it is of."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    if value is None or isinstance(value, str | bool | int | float | bytes):
        return value
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return type(value).__name__


def same(mine: Any, other: Any) -> bool:
    if isinstance(mine, torch.Tensor) or isinstance(other, torch.Tensor):
        if type(mine) is not type(other) or mine.shape != other.shape or mine.dtype != other.dtype:
            return False
        if mine.is_floating_point():
            return torch.allclose(mine, other, rtol=1e-4, atol=1e-4, equal_nan=True)
        return torch.equal(mine, other)
    if isinstance(mine, float) and isinstance(other, float):
        return mine == pytest.approx(other, rel=1e-4)
    if isinstance(mine, dict) and isinstance(other, dict):
        return mine.keys() == other.keys() and all(same(mine[k], other[k]) for k in mine)
    if isinstance(mine, list) and isinstance(other, list):
        return len(mine) == len(other) and all(map(same, mine, other))
    return type(mine) is type(other) and mine == other


def outcome(do: Call, world: World) -> Any:
    """The result of a call, or the name of its error's class."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return plain(do(world))
        except Exception as error:  # noqa: BLE001  the error is the outcome
            return {"error": type(error).__name__}


# The processor

PROCESSOR: dict[str, dict[str, Any]] = {
    "tensors": {"return_tensors": "pt"},
    "numpy": {"return_tensors": "np"},
    "lists": {},
    "no special tokens": {"return_tensors": "pt", "add_special_tokens": False},
    "padding to a length": {"return_tensors": "pt", "padding": "max_length", "max_length": 90},
    "padding to a multiple": {"return_tensors": "pt", "padding": True, "pad_to_multiple_of": 8},
    "padding on the left": {"padding": "max_length", "max_length": 90, "padding_side": "left"},
    "truncation": {"return_tensors": "pt", "truncation": True, "max_length": 4},
    "token types": {"return_tensors": "pt", "return_token_type_ids": True},
    "media token types": {"return_tensors": "pt", "return_mm_token_type_ids": True},
    "no mask": {"return_tensors": "pt", "return_attention_mask": False},
    "text_kwargs": {"text_kwargs": {"padding": "max_length", "max_length": 80}},
    "images_kwargs": {"return_tensors": "pt", "images_kwargs": {"do_normalize": False}},
    "common_kwargs": {"common_kwargs": {"return_tensors": "pt"}},
    "no rescale": {"return_tensors": "pt", "do_rescale": False},
    "no normalization": {"return_tensors": "pt", "do_normalize": False},
    "another size": {"return_tensors": "pt", "size": {"height": 21, "width": 21}},
    "another mean": {"return_tensors": "pt", "image_mean": [0.1, 0.2, 0.3]},
    "bilinear": {"return_tensors": "pt", "resample": 2},
    "unknown argument": {"return_tensors": "pt", "colour": "red"},
    "unknown tensors": {"return_tensors": "xx"},
}
for name, kwargs in PROCESSOR.items():
    call(
        f"processor: {name}",
        lambda w, kwargs=kwargs: w.processor(images=w.image(), text=w.text(), **kwargs),
    )
call("processor: text alone", lambda w: w.processor(text="Hello", return_tensors="pt"))
call("processor: images alone", lambda w: w.processor(images=w.image(), return_tensors="pt"))
call("processor: nothing", lambda w: w.processor())
call("processor: too few images", lambda w: w.processor(images=w.image(), text="<image><image>"))
call("processor: too many images", lambda w: w.processor(images=[w.image()] * 2, text="<image>"))
call("processor: positional", lambda w: w.processor(w.image(), w.text(), return_tensors="pt"))
call("processor: ragged tensors", lambda w: w.processor(text=["a", "a b c d"], return_tensors="pt"))
call("processor: batch", lambda w: w.batch())
call("processor: batch on the right", lambda w: w.batch("right"))
call(
    "processor: an array",
    lambda w: w.processor(images=np.array(w.image()), text=w.text(), return_tensors="pt"),
)
call(
    "processor: a tensor",
    lambda w: w.processor(
        images=torch.from_numpy(np.array(w.image())).permute(2, 0, 1),
        text=w.text(),
        return_tensors="pt",
    ),
)
call("processor: to dtype", lambda w: w.inputs().to(torch.bfloat16))
call("processor: to device and dtype", lambda w: w.inputs().to("cpu", torch.float16))
call("processor: attribute", lambda w: w.inputs().input_ids)
call("processor: missing attribute", lambda w: w.inputs().nothing)
call("processor: decode", lambda w: w.processor.decode(w.inputs()["input_ids"][0]))
call(
    "processor: batch_decode",
    lambda w: w.processor.batch_decode(w.batch()["input_ids"], skip_special_tokens=True),
)
call(
    "processor: decode with spaces kept",
    lambda w: w.processor.decode([5, 6, 7], clean_up_tokenization_spaces=False),
)
call("processor: model_input_names", lambda w: w.processor.model_input_names)
call("processor: image_token", lambda w: [w.processor.image_token, w.processor.image_token_id])
call("processor: patch_size", lambda w: w.processor.patch_size)
call("processor: chat_template", lambda w: w.processor.chat_template)
call(
    "processor: post_process_image_text_to_text",
    lambda w: w.processor.post_process_image_text_to_text(w.inputs()["input_ids"]),
)
call(
    "processor: image_processor",
    lambda w: w.processor.image_processor(w.image(), return_tensors="pt"),
)
call("processor: to_dict", lambda w: sorted(w.processor.to_dict()))
call(
    "processor: saved and loaded",
    lambda w: [
        w.processor.save_pretrained(w.scratch / "p") is not None,
        w.lib.AutoProcessor.from_pretrained(w.scratch / "p")(text="Hi", return_tensors="pt"),
    ],
)
call(
    "processor: class by name", lambda w: w.lib.LlavaProcessor.from_pretrained(w.folder)(text="Hi")
)
call(
    "processor: loaded with padding_side",
    lambda w: w.lib.AutoProcessor.from_pretrained(w.folder, padding_side="left")(
        text=["a", "a b c"], padding=True
    ),
)
call("processor: not there", lambda w: w.lib.AutoProcessor.from_pretrained(w.folder / "none"))

# The tokenizer

TOKENIZER: dict[str, Callable[[Any], Any]] = {
    "call": lambda t: dict(t("What is it?")),
    "pair": lambda t: dict(t("What", "is it?")),
    "encode": lambda t: t.encode("What is it?"),
    "decode": lambda t: t.decode([5, 6, 7]),
    "convert_tokens_to_ids": lambda t: t.convert_tokens_to_ids(["<image>", "<|im_end|>"]),
    "convert_ids_to_tokens": lambda t: t.convert_ids_to_tokens([5, 6]),
    "tokenize": lambda t: t.tokenize("What is it?"),
    "len": len,
    "vocab_size": lambda t: t.vocab_size,
    "get_vocab": lambda t: len(t.get_vocab()),
    "special tokens": lambda t: [t.eos_token, t.eos_token_id, t.pad_token, t.pad_token_id],
    "all_special_tokens": lambda t: sorted(t.all_special_tokens),
    "pad": lambda t: dict(t.pad({"input_ids": [[1, 2], [3]]}, return_tensors="pt")),
    "offsets": lambda t: dict(t("What is it?", return_offsets_mapping=True)),
    "word_ids": lambda t: t("What is it?").word_ids(),
    "is_fast": lambda t: t.is_fast,
}
for name, ask in TOKENIZER.items():
    call(f"tokenizer: {name}", lambda w, ask=ask: ask(w.processor.tokenizer))
call(
    "tokenizer: AutoTokenizer", lambda w: dict(w.lib.AutoTokenizer.from_pretrained(w.folder)("Hi"))
)

# The chat template

TEMPLATE: dict[str, dict[str, Any]] = {
    "text": {},
    "generation prompt": {"add_generation_prompt": True},
    "tokenized": {"add_generation_prompt": True, "tokenize": True},
    "tensors": {"tokenize": True, "return_dict": True, "return_tensors": "pt"},
    "ids as tensors": {"tokenize": True, "return_dict": False, "return_tensors": "pt"},
    "continued": {"continue_final_message": True},
    "both": {"add_generation_prompt": True, "continue_final_message": True},
    "own template": {"chat_template": "{% for m in messages %}{{ m['role'] }}{% endfor %}"},
    "unknown template": {"chat_template": "none of these"},
    "padding": {"tokenize": True, "return_dict": True, "padding": "max_length", "max_length": 90},
    "processor_kwargs": {
        "tokenize": True,
        "return_dict": True,
        "processor_kwargs": {"return_tensors": "pt"},
    },
    "assistant mask": {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True},
    "template variable": {"enable_thinking": False},
}
for name, kwargs in TEMPLATE.items():
    call(
        f"chat: {name}",
        lambda w, kwargs=kwargs: w.processor.apply_chat_template(w.chat(), **kwargs),
    )
FULL = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
call("chat: path", lambda w: w.processor.apply_chat_template(w.chat(path=str(w.images[0])), **FULL))
call("chat: url", lambda w: w.processor.apply_chat_template(w.chat(url=str(w.images[0])), **FULL))
call("chat: several", lambda w: w.processor.apply_chat_template([w.chat(), w.chat()]))
call(
    "chat: text content",
    lambda w: w.processor.apply_chat_template([{"role": "user", "content": "a"}]),
)
call("chat: no image", lambda w: w.processor.apply_chat_template(w.chat(x=1), **FULL))
call(
    "chat: tokenizer", lambda w: w.processor.tokenizer.apply_chat_template(w.chat(), tokenize=False)
)

# generate

GENERATE: dict[str, dict[str, Any]] = {
    "defaults": {},
    "max_new_tokens": {"max_new_tokens": 6},
    "max_length": {"max_length": 60},
    "both lengths": {"max_new_tokens": 6, "max_length": 60},
    "max_length too short": {"max_length": 3},
    "no tokens": {"max_new_tokens": 0},
    "negative tokens": {"max_new_tokens": -1},
    "do_sample=False": {"max_new_tokens": 6, "do_sample": False},
    "temperature without sampling": {"max_new_tokens": 6, "temperature": 0.5},
    "sampling the best": {"max_new_tokens": 6, "do_sample": True, "top_k": 1},
    "sampling coldly": {"max_new_tokens": 6, "do_sample": True, "temperature": 1e-4},
    "temperature 0": {"max_new_tokens": 6, "do_sample": True, "temperature": 0.0},
    "negative temperature": {"max_new_tokens": 6, "do_sample": True, "temperature": -1.0},
    "top_p 0": {"max_new_tokens": 6, "do_sample": True, "top_p": 1e-6},
    "top_p 2": {"max_new_tokens": 6, "do_sample": True, "top_p": 2.0},
    "min_p 1": {"max_new_tokens": 6, "do_sample": True, "min_p": 1.0},
    "typical_p": {"max_new_tokens": 6, "do_sample": True, "typical_p": 0.001},
    "repetition_penalty": {"max_new_tokens": 8, "repetition_penalty": 1.5},
    "repetition_penalty 0": {"max_new_tokens": 8, "repetition_penalty": 0.0},
    "no_repeat_ngram_size": {"max_new_tokens": 8, "no_repeat_ngram_size": 2},
    "min_new_tokens": {"max_new_tokens": 8, "min_new_tokens": 8, "eos_token_id": 198},
    "bad_words_ids": {"max_new_tokens": 8, "bad_words_ids": [[198]]},
    "suppress_tokens": {"max_new_tokens": 8, "suppress_tokens": [198, 199, 200]},
    "begin_suppress_tokens": {"max_new_tokens": 8, "begin_suppress_tokens": [198]},
    "forced_eos_token_id": {"max_new_tokens": 8, "forced_eos_token_id": 7},
    "sequence_bias": {"max_new_tokens": 8, "sequence_bias": [[[42], 9.0]]},
    "eos_token_id": {"max_new_tokens": 8, "eos_token_id": 198},
    "several ends": {"max_new_tokens": 8, "eos_token_id": [3, 198]},
    "pad_token_id": {"max_new_tokens": 8, "eos_token_id": 198, "pad_token_id": 9},
    "beams": {"max_new_tokens": 6, "num_beams": 3},
    "several beams": {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2},
    "beams and length penalty": {"max_new_tokens": 6, "num_beams": 2, "length_penalty": 2.0},
    "more answers than beams": {"max_new_tokens": 6, "num_beams": 2, "num_return_sequences": 3},
    "several greedy answers": {"max_new_tokens": 6, "num_return_sequences": 2},
    "several answers": {
        "max_new_tokens": 6, "num_return_sequences": 3, "do_sample": True, "top_k": 1
    },
    "use_cache=False": {"max_new_tokens": 4, "use_cache": False},
    "static cache": {"max_new_tokens": 4, "cache_implementation": "static"},
    "as a dict": {"max_new_tokens": 4, "return_dict_in_generate": True},
    "scores": {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True},
    "logits": {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True},
    "hidden states": {
        "max_new_tokens": 2, "return_dict_in_generate": True, "output_hidden_states": True
    },
    "prompt lookup": {"max_new_tokens": 8, "prompt_lookup_num_tokens": 3},
    "renormalize_logits": {"max_new_tokens": 4, "renormalize_logits": True},
    "stop_strings without tokenizer": {"max_new_tokens": 4, "stop_strings": ["a"]},
    "max_time": {"max_new_tokens": 4, "max_time": 60.0},
    "exponential decay": {"max_new_tokens": 8, "exponential_decay_length_penalty": [2, 1.5]},
    "unknown argument": {"max_new_token": 4},
    "top_k as text": {"max_new_tokens": 4, "do_sample": True, "top_k": "many"},
}  # fmt: skip
for name, kwargs in GENERATE.items():
    call(
        f"generate: {name}",
        lambda w, kwargs=kwargs: w.model.generate(**w.inputs(2), **copy.deepcopy(kwargs)),
    )
SHORT: dict[str, Any] = {"max_new_tokens": 5}
call("generate: batch", lambda w: w.model.generate(**w.batch(), **SHORT))
call("generate: batch on the right", lambda w: w.model.generate(**w.batch("right"), **SHORT))
call(
    "generate: batch with ends", lambda w: w.model.generate(**w.batch(), **SHORT, eos_token_id=198)
)
call(
    "generate: batch, penalty",
    lambda w: w.model.generate(**w.batch(), **SHORT, repetition_penalty=1.4),
)
call(
    "generate: batch, several",
    lambda w: w.model.generate(**w.batch(), **SHORT, num_return_sequences=2),
)
call("generate: text alone", lambda w: w.model.generate(**w.inputs(0), **SHORT))
call("generate: no mask", lambda w: w.model.generate(w.inputs(0)["input_ids"], **SHORT))
call(
    "generate: positional inputs",
    lambda w: w.model.generate(
        w.inputs()["input_ids"], pixel_values=w.inputs()["pixel_values"], **SHORT
    ),
)
call("generate: nothing", lambda w: w.model.generate(**SHORT))
call(
    "generate: too few pixels",
    lambda w: w.model.generate(w.inputs(2)["input_ids"], pixel_values=w.inputs()["pixel_values"]),
)
call("generate: no pixels", lambda w: w.model.generate(w.inputs()["input_ids"], **SHORT))
call(
    "generate: pixels of another size",
    lambda w: w.model.generate(w.inputs()["input_ids"], pixel_values=torch.zeros(1, 3, 14, 14)),
)
call("generate: ids beyond", lambda w: w.model.generate(torch.tensor([[10**6]]), **SHORT))
call("generate: ids in one dimension", lambda w: w.model.generate(torch.tensor([5, 6]), **SHORT))
call(
    "generate: embeddings",
    lambda w: w.model.generate(
        inputs_embeds=w.model.get_input_embeddings()(w.inputs(0)["input_ids"]), **SHORT
    ),
)
call(
    "generate: config",
    lambda w: w.model.generate(
        **w.inputs(), generation_config=w.lib.GenerationConfig(max_new_tokens=3)
    ),
)
call(
    "generate: config and argument",
    lambda w: w.model.generate(
        **w.inputs(), generation_config=w.lib.GenerationConfig(max_new_tokens=3), max_new_tokens=5
    ),
)
call(
    "generate: stop_strings",
    lambda w: w.model.generate(
        **w.inputs(), max_new_tokens=8, stop_strings=["\n"], tokenizer=w.processor.tokenizer
    ),
)
call(
    "generate: logits_processor",
    lambda w: w.model.generate(
        **w.inputs(),
        **SHORT,
        logits_processor=w.lib.LogitsProcessorList([lambda _, scores: scores.roll(1, -1)]),
    ),
)
call(
    "generate: stopping_criteria",
    lambda w: w.model.generate(
        **w.inputs(0),
        **SHORT,
        stopping_criteria=[lambda ids, *_, **__: torch.tensor([ids.shape[1] > 22])],
    ),
)
call(
    "generate: prefix_allowed_tokens_fn",
    lambda w: w.model.generate(**w.inputs(), **SHORT, prefix_allowed_tokens_fn=lambda *_: [7, 8]),
)
call(
    "generate: assistant_model",
    lambda w: w.model.generate(**w.inputs(0), **SHORT, assistant_model=w.model),
)
call(
    "generate: a cache to go on with",
    lambda w: w.model.generate(
        **w.inputs(), **SHORT, past_key_values=w.lib.DynamicCache(), return_dict_in_generate=False
    ),
)


def streamed(w: World) -> Any:
    streamer = w.lib.TextIteratorStreamer(w.processor.tokenizer, skip_prompt=True)
    inputs, model = w.inputs(), w.model
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, "max_new_tokens": 6, "streamer": streamer}
    )
    thread.start()
    texts = "".join(streamer)
    thread.join()
    return texts


def collected(w: World) -> Any:
    pieces: list[Any] = []

    class Streamer(w.lib.TextStreamer):  # type: ignore[misc, name-defined]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append([text, stream_end])

    ids = w.model.generate(**w.inputs(), max_new_tokens=6, streamer=Streamer(w.processor.tokenizer))
    return [ids, "".join(text for text, _ in pieces), pieces[-1][1]]


call("generate: TextIteratorStreamer", streamed)
call("generate: TextStreamer", collected)
call(
    "generate: a streamer and a batch",
    lambda w: w.model.generate(**w.batch(), streamer=w.lib.TextStreamer(w.processor.tokenizer)),
)

# forward

FORWARD: dict[str, dict[str, Any]] = {
    "logits": {},
    "last logits": {"logits_to_keep": 1},
    "a tuple": {"return_dict": False},
    "hidden states": {"output_hidden_states": True},
    "no cache": {"use_cache": False},
    "unknown feature layer": {"vision_feature_layer": -99},
    "another feature layer": {"vision_feature_layer": -1},
    "feature strategy": {"vision_feature_select_strategy": "full"},
}
for name, kwargs in FORWARD.items():
    call(f"forward: {name}", lambda w, kwargs=kwargs: w.model(**w.inputs(2), **kwargs))
call("forward: loss", lambda w: w.model(**w.labels()).loss)
call("forward: batch", lambda w: w.model(**w.batch()).logits)
call("forward: both inputs", lambda w: w.model(**w.inputs(0), inputs_embeds=torch.zeros(1, 2, 64)))
call("forward: no inputs", lambda w: w.model())
call(
    "forward: too few pixels",
    lambda w: w.model(w.inputs(2)["input_ids"], w.inputs()["pixel_values"]),
)
call("forward: base model", lambda w: w.model.model(**w.inputs()).last_hidden_state)
call(
    "forward: image features",
    lambda w: w.model.get_image_features(w.inputs()["pixel_values"]).pooler_output,
)
call(
    "forward: attentions",
    lambda w: w.fresh(attn_implementation="eager")(**w.inputs(), output_attentions=True).attentions,
)
call(
    "forward: past",
    lambda w: (
        w.model(
            torch.tensor([[5]]),
            past_key_values=w.model(**w.inputs(), use_cache=True).past_key_values,
        ).logits
    ),
)
call("forward: a hook", lambda w: hooked(w))
call("model: get_input_embeddings", lambda w: w.model.get_input_embeddings().weight)
call("model: get_output_embeddings", lambda w: w.model.get_output_embeddings().weight)
call("model: num_parameters", lambda w: w.model.num_parameters())
call("model: dtype and device", lambda w: [w.model.dtype, w.model.device])
call("model: config", lambda w: w.model.config.to_dict()["text_config"]["hidden_size"])
call("model: generation_config", lambda w: w.model.generation_config.eos_token_id)
call("model: state_dict", lambda w: w.model.state_dict())
call("model: named_modules", lambda w: len(list(w.model.named_modules())))
call("model: language_model", lambda w: type(w.model.model.language_model).__name__)
call("model: train and eval", lambda w: [w.fresh().train().training, w.fresh().eval().training])
call("model: to bfloat16", lambda w: w.fresh().to(torch.bfloat16).dtype)
call("model: half", lambda w: w.fresh().half().dtype)
call("model: can_generate", lambda w: w.model.can_generate())
call("model: get_memory_footprint", lambda w: w.model.get_memory_footprint())
call("model: gradient_checkpointing_enable", lambda w: w.fresh().gradient_checkpointing_enable())
call("model: set_attn_implementation", lambda w: w.fresh().set_attn_implementation("eager"))
call("model: copy generates", lambda w: copy.deepcopy(w.model).generate(**w.inputs(), **SHORT))


def hooked(w: World) -> Any:
    """A forward hook sees every forward of `generate`, and may change it."""
    model = w.fresh()
    seen: list[int] = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_hook(lambda *args: seen.append(args[-1][0].numel()))
    return [model.generate(**w.inputs(), max_new_tokens=3), seen]


def resized(w: World) -> Any:
    model = w.fresh()
    torch.manual_seed(1)
    model.resize_token_embeddings(512, mean_resizing=False)
    model.generation_config.suppress_tokens = list(range(model.config.image_token_id, 512))
    return [model.get_input_embeddings().weight.shape, model.generate(**w.inputs(), **SHORT)]


def changed(w: World) -> Any:
    """Weights that change between two calls, by `.data` too, change the second answer."""
    model = w.fresh()
    first = model.generate(**w.inputs(), **SHORT)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return [first, model.generate(**w.inputs(), **SHORT)]


def stepped(w: World) -> Any:
    model = w.fresh().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**w.labels()).loss.backward()
    optimizer.step()
    return [model(**w.labels()).loss, model.eval().generate(**w.inputs(), **SHORT)]


call("model: resize_token_embeddings", resized)
call("model: weights that change", changed)
call("model: a training step", stepped)

# from_pretrained

LOAD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "dtype": {"dtype": torch.bfloat16},
    "dtype as text": {"dtype": "float16"},
    "auto dtype": {"dtype": "auto"},
    "unknown dtype": {"dtype": "float17"},
    "torch_dtype": {"torch_dtype": torch.bfloat16},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "device_map cpu": {"device_map": "cpu"},
    "device_map auto": {"device_map": "auto"},
    "device_map per module": {"device_map": {"": "cpu"}},
    "device_map that is none": {"device_map": "moon"},
    "eager": {"attn_implementation": "eager"},
    "sdpa": {"attn_implementation": "sdpa"},
    "flash_attention_2": {"attn_implementation": "flash_attention_2"},
    "unknown attention": {"attn_implementation": "none"},
    "local_files_only": {"local_files_only": True},
    "use_safetensors": {"use_safetensors": True},
    "no safetensors": {"use_safetensors": False},
    "output_loading_info": {"output_loading_info": True},
    "subfolder that is not there": {"subfolder": "none"},
    "unknown argument": {"colour": "red"},
    "load_in_8bit": {"load_in_8bit": True},
    "load_in_4bit": {"load_in_4bit": True},
    "trust_remote_code": {"trust_remote_code": True},
    "variant": {"variant": "fp16"},
    "ignore_mismatched_sizes": {"ignore_mismatched_sizes": True},
    "max_memory": {"device_map": "auto", "max_memory": {"cpu": "1GB"}},
}


def parameters(model: Any) -> Any:
    model, *info = model if isinstance(model, tuple) else (model,)
    return [model.dtype, model.config._attn_implementation, dict(model.named_parameters()), info]


for name, kwargs in LOAD.items():
    call(
        f"load: {name}",
        lambda w, kwargs=kwargs: parameters(
            w.lib.LlavaForConditionalGeneration.from_pretrained(w.folder, **kwargs)
        ),
    )
call(
    "load: AutoModelForImageTextToText",
    lambda w: w.lib.AutoModelForImageTextToText.from_pretrained(w.folder).generate(
        **w.inputs(), **SHORT
    ),
)
call("load: AutoModel", lambda w: type(w.lib.AutoModel.from_pretrained(w.folder)).__name__)
call("load: AutoConfig", lambda w: w.lib.AutoConfig.from_pretrained(w.folder).model_type)
call(
    "load: config",
    lambda w: (
        w.lib.LlavaForConditionalGeneration.from_pretrained(
            w.folder, config=w.lib.AutoConfig.from_pretrained(w.folder)
        ).dtype
    ),
)
call(
    "load: from a config",
    lambda w: w.lib.AutoModelForImageTextToText.from_config(
        w.lib.AutoConfig.from_pretrained(w.folder)
    ).num_parameters(),
)
call(
    "load: not there", lambda w: w.lib.LlavaForConditionalGeneration.from_pretrained(w.folder / "x")
)
call(
    "load: quantization_config",
    lambda w: w.fresh(quantization_config=w.lib.BitsAndBytesConfig(load_in_8bit=True)).dtype,
)
call(
    "load: a class of another model", lambda w: w.lib.AutoModelForCausalLM.from_pretrained(w.folder)
)


def saved(w: World) -> Any:
    w.model.save_pretrained(w.scratch / "m")
    again = w.lib.LlavaForConditionalGeneration.from_pretrained(w.scratch / "m")
    files = sorted(path.name for path in (w.scratch / "m").iterdir())
    return [files, again.generate(**w.inputs(), **SHORT)]


def sharded(w: World) -> Any:
    w.model.save_pretrained(w.scratch / "s", max_shard_size="100KB")
    files = sorted(path.name for path in (w.scratch / "s").iterdir())
    return [files, parameters(w.lib.LlavaForConditionalGeneration.from_pretrained(w.scratch / "s"))]


def pickled(w: World) -> Any:
    file = io.BytesIO()
    torch.save(w.model, file)
    file.seek(0)
    return torch.load(file, weights_only=False).generate(**w.inputs(), **SHORT)


call("save: save_pretrained", saved)
call("save: shards", sharded)
call("save: torch.save", pickled)

# PEFT and Trainer


def lora(w: World, **kwargs: Any) -> Any:
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **kwargs
    )
    return peft.get_peft_model(w.fresh(), config).eval()


def disabled(w: World) -> Any:
    model = lora(w)
    first = model.generate(**w.inputs(), **SHORT)
    with model.disable_adapter():
        second = model.generate(**w.inputs(), **SHORT)
    return [first, second, model.generate(**w.inputs(), **SHORT)]


def reloaded(w: World) -> Any:
    import peft

    lora(w).save_pretrained(w.scratch / "a")
    model = peft.PeftModel.from_pretrained(w.fresh(), w.scratch / "a").eval()
    return model.generate(**w.inputs(), **SHORT)


def added(w: World) -> Any:
    import peft

    model = w.fresh()
    torch.manual_seed(3)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    return [model.active_adapters(), model.eval().generate(**w.inputs(), **SHORT)]


def trained(w: World) -> Any:
    model = w.fresh()
    arguments = w.lib.TrainingArguments(
        output_dir=str(w.scratch / "t"), max_steps=2, per_device_train_batch_size=1,
        learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    row = {key: value[0] for key, value in w.labels().items()}
    trainer = w.lib.Trainer(model=model, args=arguments, train_dataset=[row, row])
    result = trainer.train()
    return [result.training_loss, model.eval().generate(**w.inputs(), **SHORT)]


call("peft: generate", lambda w: lora(w).generate(**w.inputs(), **SHORT))
call("peft: loss", lambda w: lora(w)(**w.labels()).loss)
call("peft: merged", lambda w: lora(w).merge_and_unload().generate(**w.inputs(), **SHORT))
call("peft: disabled", disabled)
call("peft: saved and loaded", reloaded)
call("peft: add_adapter", added)
call("peft: dora", lambda w: lora(w, use_dora=True).generate(**w.inputs(), **SHORT))
call("trainer: two steps", trained)

# The pipeline


def pipe(w: World, **kwargs: Any) -> Any:
    return w.lib.pipeline("image-text-to-text", model=w.model, processor=w.processor, **kwargs)


PIPELINE: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": 4},
    "new text alone": {"max_new_tokens": 4, "return_full_text": False},
    "tensors": {"max_new_tokens": 4, "return_tensors": True},
    "both": {"max_new_tokens": 4, "return_full_text": True, "return_tensors": True},
    "generate_kwargs": {"generate_kwargs": {"max_new_tokens": 3, "num_beams": 2}},
    "tokens twice": {"max_new_tokens": 4, "generate_kwargs": {"max_new_tokens": 3}},
    "stop_sequence": {"max_new_tokens": 4, "stop_sequence": "a"},
    "special tokens": {"max_new_tokens": 4, "skip_special_tokens": False},
    "unknown argument": {"max_new_tokens": 4, "colour": "red"},
}
for name, kwargs in PIPELINE.items():
    call(f"pipeline: {name}", lambda w, kwargs=kwargs: pipe(w)(text=w.chat(), **kwargs))
call("pipeline: images and text", lambda w: pipe(w)(w.image(), text=w.text(), max_new_tokens=4))
call("pipeline: paths", lambda w: pipe(w)(str(w.images[0]), text=w.text(), max_new_tokens=4))
call("pipeline: chats", lambda w: pipe(w)(text=[w.chat(), w.chat()], max_new_tokens=4))
call("pipeline: text alone", lambda w: pipe(w)(text="Hello", max_new_tokens=4))
call("pipeline: nothing", lambda w: pipe(w)())
call(
    "pipeline: by folder",
    lambda w: w.lib.pipeline("image-text-to-text", model=str(w.folder))(
        text=w.chat(path=str(w.images[0])), max_new_tokens=1
    ),
)
call("pipeline: unknown task", lambda w: w.lib.pipeline("paint", model=str(w.folder)))
call(
    "pipeline: in batches",
    lambda w: pipe(w, batch_size=2)(text=[w.chat(), w.chat()], max_new_tokens=4),
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, World]:
    base = tmp_path_factory.mktemp("field")
    folder = tiny_checkpoint(base / "llava-tiny")
    images = []
    for index, color in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (40 + 20 * index, 30), color)
        image.paste("white", (3, 4, 20, 10 + 5 * index))
        image.save(base / f"{color}.png")
        images.append(base / f"{color}.png")
    return (
        World(hf, folder, images, base / "hf"),
        World(transformers, folder, images, base / "transformers"),
    )


@pytest.mark.parametrize("name", CALLS)
def test_same_result_or_error(worlds: tuple[World, World], name: str) -> None:
    mine, other = (outcome(CALLS[name], world) for world in worlds)
    assert same(mine, other), f"hf: {mine}\ntransformers: {other}"


def test_enough_calls() -> None:
    assert len(CALLS) >= 120
