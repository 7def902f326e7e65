"""transformers' classes whose `generate` is run by the engine wherever it computes the same.

Weights are in memory once: the engine's network is made of the model's own parameters and linear
layers. transformers checks and prepares all arguments; only its greedy and sampling loop
(`GenerationMixin._sample`) is replaced, and only for a plan that `_plan` can make. Everything else
(beam search, own logits processors or stopping criteria, scores, hooks, a cache of one's own ...)
runs in transformers' loop. The one difference: the engine never generates an image placeholder.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .. import checkpoints, config_json, license_notice
from ..chat import kv_memory, named_dtype, pick_device
from ..checkpoints.layouts import stored_name
from ..config import LlavaConfig
from ..engine import Engine, Request, SamplingParams
from ..errors import LlavaError, OptionError, Unsupported
from ..model import Llava
from ..prompt import Prompt
from ..quantization.linear_cpu import QuantizedLinearBase
from .media import MEDIA_ARGUMENTS, prompts
from .pipelines import pipeline as light_pipeline
from .processor import LlavaOnevisionProcessor as LightOnevisionProcessor

LAYOUT: checkpoints.CheckpointLayout = "transformers-5"
_OTHER_MEDIA_ARGUMENTS = (
    "mm_encoder_outputs",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "vision_aspect_ratio",
    "image_sizes_videos",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUPPRESSED = -1000.0
"""Logit bias of a suppressed token: the smallest that `SamplingParams` takes."""


class EngineGeneration:
    """Greedy search and sampling of a transformers class, run by the engine.

    `from_pretrained(..., precision="int4")` (or int8, or per component as in `load`) quantizes the
    linear layers while they are read; a checkpoint written by `llava quantize` loads as it is.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        precision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', with `precision`."""
        name = pretrained_model_name_or_path
        if precision is None and _stored_precision(name) is None:
            model = super().from_pretrained(name, *model_args, **kwargs)  # type: ignore[misc]
        else:
            model = _load_quantized(cls, name, precision, *model_args, **kwargs)
        _show_notice(name, model)
        return model

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: weights have transformers' names in files."""
        return False

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; quantized weights are refused."""
        if precision := self.__dict__.get("_precision"):
            raise Unsupported(
                f"{precision} weights are not saved in transformers' format: save the checkpoint "
                "that they were made from, or write an int4/int8 one with `llava quantize`"
            )
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def _prepare_multimodal_encoder_kwargs_for_generation(
        self, model_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Leave the media to the engine; they are encoded here only if another loop needs them."""
        encode = super()._prepare_multimodal_encoder_kwargs_for_generation  # type: ignore[misc]
        media = {key: model_kwargs[key] for key in MEDIA_ARGUMENTS if key in model_kwargs}
        pixels = [value for key, value in media.items() if key.startswith("pixel_values")]
        if not any(isinstance(value, Tensor) for value in pixels) or any(
            model_kwargs.get(key) is not None for key in _OTHER_MEDIA_ARGUMENTS
        ):
            return encode(model_kwargs)
        for key in media:
            del model_kwargs[key]
        model_kwargs["mm_encoder_outputs"] = PendingMedia(
            media, lambda: encode(dict(media))["mm_encoder_outputs"]
        )
        return model_kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """As transformers'; images that are not encoded yet stay as they are."""
        images = model_kwargs.get("mm_encoder_outputs")
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        if expand_size == 1 or not isinstance(images, PendingMedia):
            return expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        model_kwargs["mm_encoder_outputs"] = None
        expanded, model_kwargs = expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        of_outputs: Any = self._expand_multimodal_outputs  # type: ignore[attr-defined]
        model_kwargs["mm_encoder_outputs"] = images.expanded(
            expand_size, lambda outputs: of_outputs(input_ids, outputs, expand_size)
        )
        return expanded, model_kwargs

    def _sample(
        self,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """transformers' loop, or the engine's where there is a plan."""
        images = model_kwargs.get("mm_encoder_outputs")
        if not synced_gpus and (streamer is None or len(input_ids) == 1):
            plan = _plan(
                self.config,  # type: ignore[attr-defined]
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                model_kwargs,
            )
            rows = None if plan is None else self._llava_engine.run(self, plan, streamer)
            if plan is not None and rows is not None:
                return plan.output(input_ids, rows)
        if isinstance(images, PendingMedia):
            model_kwargs["mm_encoder_outputs"] = images.encoded()
        return super()._sample(  # type: ignore[misc]
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    @property
    def _llava_engine(self) -> SharedEngine:
        """Kept in `__dict__`: it is no part of the model's state, and copies have their own."""
        engine: SharedEngine = self.__dict__.setdefault("_shared_engine", SharedEngine())
        return engine


class LlavaForConditionalGeneration(
    EngineGeneration,
    transformers.LlavaForConditionalGeneration,  # type: ignore[misc]
):
    """transformers' class with `EngineGeneration`."""


class LlavaOnevisionForConditionalGeneration(
    EngineGeneration,
    transformers.LlavaOnevisionForConditionalGeneration,  # type: ignore[misc]
):
    """transformers' class with `EngineGeneration`."""


_CLASSES = {
    transformers.LlavaForConditionalGeneration: LlavaForConditionalGeneration,
    transformers.LlavaOnevisionForConditionalGeneration: LlavaOnevisionForConditionalGeneration,
}


class AutoModelForImageTextToText(transformers.AutoModelForImageTextToText):  # type: ignore[misc]
    """transformers' class; a LLaVA model that it loads generates by the engine."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name = pretrained_model_name_or_path
        if kwargs.get("precision") is not None or _stored_precision(name) is not None:
            return _class_of(name, kwargs.get("revision")).from_pretrained(name, *args, **kwargs)
        kwargs.pop("precision", None)
        model = use_engine(super().from_pretrained(name, *args, **kwargs))
        _show_notice(name, model)
        return model

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        return use_engine(super().from_config(config, **kwargs))


def pipeline(task: Any = None, model: Any = None, *args: Any, **kwargs: Any) -> Any:
    """transformers' `pipeline`; a LLaVA model in it generates by the engine.

    precision: as of `LlavaForConditionalGeneration.from_pretrained`.
    """
    precision = kwargs.pop("precision", None)
    if isinstance(model, str | Path) and not kwargs.get("processor"):
        where = {name: kwargs[name] for name in ("revision",) if name in kwargs}
        if _needs_torchvision(model, where):
            names = ("dtype", "torch_dtype", "device_map", "revision")
            loading = {name: kwargs.pop(name) for name in names if name in kwargs}
            source = str(model)
            made = AutoModelForImageTextToText.from_pretrained(
                source, precision=precision, **loading
            )
            processor = LightOnevisionProcessor.from_pretrained(source, **where)
            return light_pipeline(task, made, *args, processor=processor, **kwargs)
    if isinstance(model, str | Path) and (precision or _stored_precision(model)):
        loading = {name: kwargs.pop(name) for name in ("dtype", "revision") if name in kwargs}
        source = str(model)
        model = AutoModelForImageTextToText.from_pretrained(source, precision=precision, **loading)
        if kwargs.get("processor") is None:
            kwargs["processor"] = transformers.AutoProcessor.from_pretrained(source)
    made = transformers.pipeline(task, model, *args, **kwargs)
    if getattr(made, "model", None) is not None:
        use_engine(made.model)
    return made


class AutoProcessor(transformers.AutoProcessor):  # type: ignore[misc]
    """transformers' class; of OneVision, this package's where torchvision is not installed, which
    transformers needs for videos.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers': the processor of a checkpoint folder or a Hugging Face name."""
        name = pretrained_model_name_or_path
        if _needs_torchvision(name, kwargs):
            return LightOnevisionProcessor.from_pretrained(name, *args, **kwargs)
        return super().from_pretrained(name, *args, **kwargs)


LlavaOnevisionProcessor: Any = (
    LightOnevisionProcessor
    if importlib.util.find_spec("torchvision") is None
    else transformers.LlavaOnevisionProcessor
)


def _needs_torchvision(name: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether transformers' processor of a folder or a Hugging Face name lacks torchvision.

    arguments: of its `from_pretrained`.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return False
    where = {"revision", "token", "cache_dir", "local_files_only", "subfolder"} & arguments.keys()
    try:
        config = transformers.AutoConfig.from_pretrained(
            name, **{key: arguments[key] for key in where}
        )
    except (OSError, ValueError):  # transformers says what is wrong with it
        return False
    return isinstance(config, transformers.LlavaOnevisionConfig)


def use_engine(model: Any) -> Any:
    """Let a loaded transformers LLaVA model (or a PEFT model of one) generate by the engine."""
    for module in model.modules():
        if type(module) in _CLASSES:
            module.__class__ = _CLASSES[type(module)]
    return model


class PendingMedia(dict[str, Any]):
    """`mm_encoder_outputs` of images and videos that are encoded on first access.

    media: `MEDIA_ARGUMENTS`. copies: of each row of the prompts.
    """

    def __init__(
        self, media: Mapping[str, Any], encode: Callable[[], Any], copies: int = 1
    ) -> None:
        super().__init__()
        self.media, self.encode, self.copies = media, encode, copies
        self.outputs: Any = None

    def expanded(self, copies: int, expand: Callable[[Any], Any]) -> PendingMedia:
        return PendingMedia(self.media, lambda: expand(self.encoded()), self.copies * copies)

    def encoded(self) -> Any:
        if self.outputs is None:
            self.outputs = self.encode()
        return self.outputs

    def get(self, key: str, default: Any = None) -> Any:
        return self.encoded().get(key, default)

    def __getitem__(self, key: str) -> Any:
        return self.encoded()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.encoded()

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True)
class Plan:
    """A call of `generate` for the engine: prompts without padding, sampling without seeds."""

    prompts: list[Prompt]
    sampling: dict[str, Any]
    pad_token_id: int

    def requests(self) -> list[SamplingParams]:
        """torch's generator decides the seeds, so `torch.manual_seed` makes sampling repeatable."""
        greedy = not self.sampling.get("temperature")
        return [
            SamplingParams(**self.sampling, seed=None if greedy else int(torch.randint(2**31, ())))
            for _ in self.prompts
        ]

    def output(self, input_ids: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
        """Prompts and new tokens `[B, T]`, the shorter ones padded on the right."""
        longest = max(map(len, rows))
        padded = [[*row, *[self.pad_token_id] * (longest - len(row))] for row in rows]
        tails = torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat([input_ids, tails], dim=1)


def _plan(
    config: Any,
    input_ids: Tensor,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    generation: Any,
    model_kwargs: Mapping[str, Any],
) -> Plan | None:
    """The call as the engine runs it; None if it cannot."""
    sampling = _sampling(processors, generation)
    ends = _ends(criteria)
    unpadded = _prompts(config, input_ids, model_kwargs)
    if sampling is None or ends is None or unpadded is None:
        return None
    max_length, eos = ends
    new = max_length - input_ids.shape[1]
    if new < 1 or max_length > config.text_config.max_position_embeddings:
        return None
    padded = any(len(prompt) < input_ids.shape[1] for prompt in unpadded)
    if padded and "repetition_penalty" in sampling:  # transformers penalizes the padding too
        return None
    pad = getattr(generation, "_pad_token_tensor", None)
    return Plan(
        unpadded,
        sampling | {"max_new_tokens": new, "ignore_eos": True, "stop_ids": eos},
        0 if pad is None else int(pad),
    )


def _sampling(processors: Sequence[Any], generation: Any) -> dict[str, Any] | None:
    """The engine's parameters that do what the prepared logits processors do, in their order."""
    if (
        generation.return_dict_in_generate
        or not generation.use_cache
        or generation.cache_implementation is not None
    ):
        return None
    sampling: dict[str, Any] = {"temperature": 1.0} if generation.do_sample else {}
    order = list(_PROCESSORS)
    if not all(type(one) in order for one in processors):
        return None
    positions = [order.index(type(one)) for one in processors]
    if positions != sorted(set(positions)):
        return None
    for one in processors:
        value = _PROCESSORS[type(one)](one)
        if value is None:
            return None
        sampling |= value
    return sampling


def _warper(name: str, attribute: str) -> Callable[[Any], dict[str, Any] | None]:
    def read(one: Any) -> dict[str, Any] | None:
        usual = one.filter_value == -float("inf") and one.min_tokens_to_keep == 1
        return {name: getattr(one, attribute)} if usual else None

    return read


def _top_k(one: Any) -> dict[str, Any] | None:
    return {"top_k": int(one.top_k)} if one.filter_value == -float("inf") else None


def _repetition(one: Any) -> dict[str, Any] | None:
    plain = one.prompt_ignore_length is None and one.cu_seq_lens_q is None
    return {"repetition_penalty": float(one.penalty)} if plain else None


def _suppressed(one: Any) -> dict[str, Any]:
    return {"logit_bias": dict.fromkeys(one.suppress_tokens.tolist(), SUPPRESSED)}


_PROCESSORS: dict[type[Any], Callable[[Any], dict[str, Any] | None]] = {
    RepetitionPenaltyLogitsProcessor: _repetition,
    SuppressTokensLogitsProcessor: _suppressed,
    TemperatureLogitsWarper: lambda one: {"temperature": float(one.temperature)},
    TopKLogitsWarper: _top_k,
    TopPLogitsWarper: _warper("top_p", "top_p"),
    MinPLogitsWarper: _warper("min_p", "min_p"),
}
"""transformers' processors that the engine has too, in the order of both."""


def _ends(criteria: Sequence[Any]) -> tuple[int, tuple[int, ...]] | None:
    """The maximum length and the end tokens, if nothing else ends an answer."""
    lengths = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
    ends = [one.eos_token_id for one in criteria if type(one) is EosTokenCriteria]
    if len(lengths) + len(ends) != len(criteria) or not lengths:
        return None
    tokens = {int(token) for one in ends for token in one.flatten().tolist()}
    return min(lengths), tuple(token for token in tokens if token >= 0)


_KNOWN = {
    "attention_mask", "position_ids", "mm_encoder_outputs", "past_key_values", "use_cache",
    "logits_to_keep", "cache_position",
}  # fmt: skip


def _prompts(
    config: Any, input_ids: Tensor, model_kwargs: Mapping[str, Any]
) -> list[Prompt] | None:
    """The rows without their left padding, each run of placeholders cut into images."""
    if any(value is not None for key, value in model_kwargs.items() if key not in _KNOWN):
        return None
    cache = model_kwargs.get("past_key_values")
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length()):
        return None
    images = model_kwargs.get("mm_encoder_outputs") or None
    if images is not None and not isinstance(images, PendingMedia):
        return None
    if input_ids.dim() != 2 or not input_ids.numel():
        return None
    rows = _rows(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
    if rows is None or not all(0 <= t < config.text_config.vocab_size for row in rows for t in row):
        return None
    media, copies = ({}, 1) if images is None else (images.media, images.copies)
    try:
        return prompts(rows, media, _own_config(config), copies)
    except LlavaError:  # transformers says what is wrong
        return None


def _rows(input_ids: Tensor, mask: Any, positions: Any) -> list[list[int]] | None:
    """The tokens of each row without left padding; None for another mask or other positions."""
    if mask is not None and mask.shape != input_ids.shape:
        return None
    kept = torch.ones_like(input_ids) if mask is None else (mask != 0).to(input_ids)
    if not bool((kept.cummax(-1).values == kept).all()) or not bool(kept[:, -1].all()):
        return None
    if positions is not None:
        expected = (kept.cumsum(-1) - 1).to(positions)
        if positions.shape != expected.shape:
            return None
        if bool(((positions != expected) & (kept != 0).to(positions.device)).any()):
            return None
    return [row[keep != 0].tolist() for row, keep in zip(input_ids, kept, strict=True)]


@dataclass
class SharedEngine:
    """The engine over a model's weights, made on first use and again when they were replaced."""

    engine: Engine | None = None
    structure: Any = None
    values: Any = None
    reason: str = ""
    lock: Any = field(default_factory=threading.Lock)

    def __deepcopy__(self, memo: Any) -> SharedEngine:
        return SharedEngine()

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedEngine, ()

    @torch.inference_mode()
    def run(self, model: Any, plan: Plan, streamer: Any) -> list[list[int]] | None:
        """The new tokens of each prompt; None, with a `reason`, if the engine cannot run them."""
        with self.lock:
            engine = self._current(model)
            if engine is None:
                return None
            requests: list[Request] = []
            try:
                for prompt, sampling in zip(plan.prompts, plan.requests(), strict=True):
                    requests.append(engine.add(prompt, sampling))
            except LlavaError as error:
                self.reason = str(error)
                for request in requests:
                    engine.abort(request)
                return None
            try:
                self._finish(engine, requests, streamer)
            finally:
                for request in requests:
                    engine.abort(request)
        return [request.generated for request in requests]

    def _finish(self, engine: Engine, requests: list[Request], streamer: Any) -> None:
        shown = 0
        while any(request.finish_reason is None for request in requests):
            for event in engine.step():
                if event.error is not None:
                    raise event.error
            if streamer is not None:
                for token in requests[0].generated[shown:]:
                    streamer.put(torch.tensor([token]))
                shown = len(requests[0].generated)
        if streamer is not None:
            streamer.end()

    def _current(self, model: Any) -> Engine | None:
        modules = dict(model.named_modules())
        parameters = list(model.parameters())
        if reason := _unsupported(model, modules, parameters):
            self.reason, self.engine = reason, None
            return None
        tensors = [(id(p), p.data_ptr(), p.dtype, p.device) for p in parameters]
        structure = tensors, [id(module) for module in modules.values()]
        if self.engine is None or structure != self.structure:
            try:
                network = share(model)
            except LlavaError as error:
                self.reason = str(error)
                return None
            size = network.config.text.vocab_size
            self.engine = Engine(network, eos_ids=(), vocab=size, kv_bytes=kv_memory(network))
            self.structure, self.values = structure, None
        values = _fingerprint(modules, parameters)
        if values is None or values != self.values:  # the KV cache and the features are of others
            self.engine.clear()
        self.values = values
        return self.engine


def _unsupported(model: Any, modules: Mapping[str, nn.Module], parameters: Sequence[Tensor]) -> str:
    """Why the engine cannot stand for the model's own forward; empty if it can."""
    if model.training:
        return "the model is in training mode"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are global forward hooks"
    for name, module in modules.items():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in module.__dict__ or not all(map(_is_recorder, hooks)):
            return f"{name or 'the model'} has a forward hook or a forward of its own"
    if len({p.dtype for p in parameters if p.is_floating_point()}) != 1:
        return "the model has parameters of several dtypes"
    if model.dtype not in DTYPES or len({p.device for p in parameters}) != 1:
        return f"the model is in {model.dtype} or on several devices"
    return ""


def _is_recorder(hook: Any) -> bool:
    """Whether a hook is transformers' own, which records hidden states on request."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.utils.output_capturing")


def _fingerprint(modules: Mapping[str, nn.Module], parameters: Sequence[Tensor]) -> Any:
    """Changes with the weights: their versions, and one element of each (`.data` has no version).

    None if a linear layer is another class's, whose state is unknown (a LoRA that can be disabled).
    """
    plain = "llava_interleave", "transformers", "torch"
    if any(type(module).__module__.split(".")[0] not in plain for module in modules.values()):
        return None
    samples = torch.stack([p.detach().reshape(-1)[p.numel() // 2] for p in parameters])
    return [p._version for p in parameters], samples.tolist()


def share(model: Any) -> Llava:
    """This package's network over the parameters and linear layers of a transformers model."""
    network = checkpoints.meta_network(_own_config(model.config))
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            network.set_submodule(name, _owner(model, f"{name}.weight"))
            continue
        for key, own in list(module.named_parameters(recurse=False)):
            other = getattr(_owner(model, f"{name}.{key}".lstrip(".")), key, None)
            if other is None or other.shape != own.shape:
                raise Unsupported(f"{name} has no {key} of shape {tuple(own.shape)}")
            module.register_parameter(key, other)
    return network.eval()


def _owner(model: Any, parameter: str) -> nn.Module:
    """The module of a transformers model that has a parameter of ours."""
    return model.get_submodule(_owner_name(parameter))


def _owner_name(parameter: str) -> str:
    return stored_name(parameter, LAYOUT).rpartition(".")[0]


def _own_config(config: Any) -> LlavaConfig:
    values = {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
    return config_json.from_dict(values)


def _class_of(name: Any, revision: str | None = None) -> Any:
    """The class of a checkpoint folder or a Hugging Face name."""
    checkpoint = checkpoints.Checkpoint.open(checkpoints.resolve(name, revision))
    onevision = checkpoint.config.video_token_id is not None
    return LlavaOnevisionForConditionalGeneration if onevision else LlavaForConditionalGeneration


def _stored_precision(name: Any) -> str | None:
    """The precision of a folder that `llava quantize` wrote."""
    folder = Path(str(name))
    if not (folder / "config.json").is_file():
        return None
    try:
        return checkpoints.Checkpoint.open(folder).precision
    except LlavaError:  # transformers says what is wrong with it
        return None


def _show_notice(name: Any, model: Any) -> None:
    model = model[0] if isinstance(model, tuple) else model
    license_notice.show_once(str(name), Path(str(name)), model.config.to_dict())


def _load_quantized(
    cls: Any,
    name: Any,
    precision: str | None,
    *model_args: Any,
    dtype: Any = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """A transformers model whose linear layers are this package's quantized ones."""
    from accelerate import init_empty_weights

    if model_args or kwargs:
        given = ", ".join(["positional arguments"] * bool(model_args) + sorted(kwargs))
        raise OptionError(f"{given}: not with precision={precision!r}; leave one of them out")
    checkpoint = checkpoints.Checkpoint.open(checkpoints.resolve(name, revision))
    folder = checkpoint.folder
    if not issubclass(cls, own := _class_of(folder)):
        raise OptionError(f"{name} is a checkpoint of {own.__name__}, not of {cls.__name__}")
    wanted = dtype if dtype is not None else torch_dtype
    if isinstance(wanted, str):
        wanted = None if wanted == "auto" else named_dtype(wanted)
    device = pick_device(
        "cpu" if device_map is None else str(device_map), checkpoint, precision or "auto"
    )
    network = checkpoints.load(checkpoint, dtype=wanted, device=device, precision=precision)
    values = transformers.AutoConfig.from_pretrained(folder).to_dict()
    values.pop("quantization_config", None)
    config = cls.config_class.from_dict(values)
    with init_empty_weights(include_buffers=False):
        model = cls(config)
    for key, module in list(network.named_modules()):
        if isinstance(module, nn.Linear | QuantizedLinearBase):
            model.set_submodule(_owner_name(f"{key}.weight"), module)
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            _owner(model, f"{key}.{leaf}".lstrip(".")).register_parameter(leaf, parameter)
    dtype = network.language_model.norm.weight.dtype
    for module in model.modules():  # vision layers after the one whose features are used
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                zeros = torch.zeros_like(parameter, dtype=dtype, device=device)
                module.register_parameter(leaf, nn.Parameter(zeros, requires_grad=False))
    model.to(device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.__dict__["_precision"] = precision or checkpoint.precision
    return model.eval()
