"""Loads a chatbot: finds the checkpoint, chooses device and precision, builds the engine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .. import checkpoints, license_notice
from ..checkpoints import Checkpoint
from ..distributed.loading import load_shard
from ..distributed.process_group import rank_and_world_size
from ..distributed.replicated_engine import ReplicatedEngine
from ..engine import Engine
from ..errors import CheckpointError
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
    batch_invariant: bool = False,
    adapters: Mapping[str, str | os.PathLike[str]] = {},
    progress: Callable[[int, int], None] | None = None,
) -> Chatbot:
    """A chatbot from a checkpoint folder or a Hugging Face name; without one, the built-in model.

    precision: float32, bfloat16, float16, or auto: float32 for a network of up to 100 M parameters
    and, on a CPU, for one stored in float32; else bfloat16 (float16 on a GPU without it, and on
    Apple's), with weights of 8 bits on a CPU that has kernels for them. int8 or int4, on a CPU or a
    CUDA GPU, fp8 or nf4, on a CUDA GPU, quantize the linears' weights and compute the rest as auto
    does; int4 leaves tower and output head in 8 bits. Tower, decoder and head can be apart:
    "int4,head=int4", "int8,tower=float". A folder that `llava quantize` wrote is taken as it is.
    device: cpu, cuda, cuda:1, mps, or auto: the CUDA GPU where there is one and the network fits;
    `Chatbot.info()` tells.
    limits: what media may be read. kv_bytes: memory for keys and values; None takes two full
    contexts, at most a quarter of the memory, and on a CUDA GPU what its largest step leaves.
    kv_precision: int8 keeps them in half the bytes of bfloat16; auto in the numbers that are
    computed in.
    batch_invariant: an answer is the same to the last bit whatever is asked beside it, on a CPU or
    a CUDA GPU; several at once then take longer.
    adapters: name and folder of each that a question can choose by the option `adapter`.
    progress: called with the bytes of weights read so far and in all.

    Where torchrun has started several processes, each takes its share of the network, on a GPU of
    its own if there are any. The first gets the chatbot; the others follow it and end with it.
    """
    checkpoint = Checkpoint.open(locate(name_or_folder, revision))
    folder = checkpoint.folder
    beside = {name: adapter_folder(adapter) for name, adapter in adapters.items()}
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
        kv_memory(model, kv_precision) if kv_bytes is None else kv_bytes,
    )
    engine = (ReplicatedEngine if tp_group else Engine)(
        model,
        eos_ids=tokenizer.eos_ids,
        vocab=tokenizer.size,
        kv_bytes=kv,
        kv_precision=kv_precision,
        batch_invariant=batch_invariant,
    )
    if tp_group and isinstance(engine, ReplicatedEngine):
        engine.start(tp_group)
    bot = Chatbot(folder, processor, engine, model)
    for name, adapter in beside.items():
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
    limits: Limits = Limits(),  # noqa: B008  frozen
) -> Estimate:
    """As `Chatbot.estimate` for one question, without loading weights, or fetching them where they
    are on the hub.
    """
    checkpoint = Checkpoint.open(locate(name_or_folder, revision, tensors=False))
    messages = [{"role": "user", "content": content(question, attachments)}]
    place = pick_device(device, checkpoint, precision)
    dtype, bits = pick_precision(precision, checkpoint, place)
    warn_if_slow(bits, dtype, place)
    processor = Processor.from_folder(checkpoint.folder, checkpoint.config, limits)
    counted = processor.estimate(
        messages, options=prompt_options(options), number_bytes=dtype.itemsize
    )
    return dataclasses.replace(
        counted, weight_bytes=checkpoints.weight_bytes(processor.config, dtype, bits, place)
    )


def locate(
    name_or_folder: str | os.PathLike[str] | None, revision: str | None, *, tensors: bool = True
) -> Path:
    """The folder of a checkpoint; of the built-in model without a name. From the hub without
    weights if `tensors` is False.
    """
    if name_or_folder is None and not (BUILTIN / "config.json").is_file():
        raise CheckpointError(
            "this installation carries no built-in model; name a checkpoint folder or a Hugging "
            "Face model"
        )
    name = BUILTIN if name_or_folder is None else name_or_folder
    return checkpoints.resolve(
        name if isinstance(name, str) else Path(name), revision, tensors=tensors
    )
