"""A checkpoint folder becomes a network: every tensor straight to its type and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import LlavaConfig
from ..errors import CheckpointError, OptionError, Unsupported
from ..kernels import PANEL, triton
from ..model import Llava
from ..quantization import linear_cuda
from ..quantization.linear_cpu import QuantizedLinear
from ..quantization.linear_cuda import Float8Linear, NF4Linear
from ..quantization.packing import pack
from ..quantization.replace import pack_for_cuda, replace_linears
from .checkpoint import Checkpoint
from .layouts import is_ignored, network_name
from .safetensors_file import FLOATS, TYPES, Reader, Stored, same

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EMBEDDING, _HEAD = "language_model.embed_tokens.weight", "lm_head.weight"


def load(
    source: str | Path | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    precision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Llava:
    """The network of a checkpoint folder for inference: no gradients, evaluation mode.

    dtype: float32, bfloat16 or float16; None: the type that the embedding is stored in.
    precision: int4 or int8, also per component (`quantization.precision`), quantizes linears while
    reading, a few rows at a time; fp8 or nf4 (on a CUDA GPU) one linear after another. `dtype` is
    then the type of the activations. A folder that is already quantized is loaded as it is.
    progress: called with the bytes read so far and in all.
    Weights in their stored type on the CPU are memory-mapped (see `Reader`): do not change the
    files in place meanwhile. Others, and all on a GPU, come through a buffer of 4 MB, one tensor
    after another. Missing, surplus and misshapen tensors are listed in one `CheckpointError`.
    """
    checkpoint, place = Checkpoint.open(source), get_device(device)
    stored_precision = checkpoint.precision
    if stored_precision and precision not in (None, stored_precision):
        raise OptionError(
            f"{checkpoint.folder} has {stored_precision} weights; "
            f"for {precision} quantize the checkpoint that it was made from"
        )
    model = meta_network(checkpoint.config, stored_precision)
    tensors = match(model, checkpoint)
    dtype = dtype or FLOATS[tensors[_EMBEDDING].dtype]
    if dtype == torch.float64:
        dtype = torch.float32
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise OptionError(f"the dtype of weights is one of {names}, not {dtype}")
    if stored_precision or precision:
        linear_cuda.check_supported(str(stored_precision or precision), place)
    buffers = {name: value.dtype for name, value in model.named_buffers()}
    to_quantize = replace_linears(model, precision) if precision and not stored_precision else set()
    total, done = sum(stored.bytes for stored in tensors.values()), 0
    state: dict[str, Tensor] = {}
    in_order = sorted(tensors.items(), key=lambda item: (item[1].path, item[1].start))
    for path, group in groupby(in_order, key=lambda item: item[1].path):
        with path.open("rb", buffering=0) as file:
            reader = Reader(file)
            for name, stored in group:
                linears = [name.removesuffix(".weight")]
                if name == _EMBEDDING and model.config.text.tie_word_embeddings:
                    linears.append("lm_head")  # quantized, the head is a matrix of its own
                for linear in to_quantize.intersection(linears):
                    module = model.get_submodule(linear)
                    state |= _read_quantized(reader, stored, linear, module, place)
                if linears[0] not in to_quantize:
                    state[name] = reader.read(stored, buffers.get(name, dtype), place)
                done += stored.bytes
                if progress:
                    progress(done, total)
    model.load_state_dict(state, strict=False, assign=True)
    if isinstance(model.lm_head, nn.Linear):
        model.tie()
    state.clear()  # repacking frees each weight as it goes
    if (stored_precision or precision) and triton.unavailable_reason(place, dtype) is None:
        pack_for_cuda(model)
    assert {value.device.type for value in model.state_dict().values()} == {place.type}
    return model.requires_grad_(False).eval()


def _read_quantized(
    reader: Reader, stored: Stored, name: str, linear: nn.Module, place: torch.device
) -> dict[str, Tensor]:
    """Weight and scale of a linear. int4 and int8 are quantized a few rows at a time, so that the
    floats are never all in memory."""
    if isinstance(linear, Float8Linear | NF4Linear):
        weight, scale = linear.pack(reader.read(stored, FLOATS[stored.dtype], place))
        return {f"{name}.weight": weight, f"{name}.scale": scale}
    assert isinstance(linear, QuantizedLinear)
    weight = torch.empty_like(linear.weight, device=place)
    scale = torch.empty_like(linear.scale, device=place)
    panel = 0
    for rows in reader.rows(stored, PANEL):
        w, s = pack(rows.to(place), linear.bits)
        weight[panel : panel + len(w)], scale[panel : panel + len(w)] = w, s
        panel += len(w)
    return {f"{name}.weight": weight, f"{name}.scale": scale}


class _NoInit(TorchFunctionMode):
    """Skips random initialization: `normal_` on the meta device imports torch's compiler, 2 s."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is torch.nn.init.normal_ else func(*args, **kwargs)


def meta_network(config: LlavaConfig, precision: str | None = None) -> Llava:
    """The network on the meta device, with shapes and no memory; with quantized linears if a
    precision is given."""
    with _NoInit(), torch.device("meta"):
        model = Llava(config)
    if precision:
        replace_linears(model, precision)
    return model


def tensor_shapes(model: Llava) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of the network, without a tied head."""
    tied = model.config.text.tie_word_embeddings and isinstance(model.lm_head, nn.Linear)
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if not (tied and name == _HEAD)
    }


def weight_bytes(config: LlavaConfig, dtype: torch.dtype, precision: str | None = None) -> int:
    """Bytes of a network's weights, floats in `dtype`, linears in `precision`."""
    if precision is None:
        return config.num_parameters * dtype.itemsize
    model = meta_network(config, precision)
    quantized = sum(value.nbytes for value in model.buffers())
    return quantized + sum(p.numel() for p in model.parameters()) * dtype.itemsize


def match(model: Llava, checkpoint: Checkpoint) -> dict[str, Stored]:
    """The stored tensor of every tensor of the network; all mismatches are in one
    `CheckpointError`."""
    expected = tensor_shapes(model)
    buffers = {name: value.dtype for name, value in model.named_buffers()}
    tensors: dict[str, Stored] = {}
    surplus: list[str] = []
    wrong: list[str] = []
    for key, stored in checkpoint.headers.items():
        name = network_name(key)
        if name in tensors:
            wrong.append(f"{key} is a second {name}")
        elif name in expected or name == _HEAD:
            tensors[name] = stored
        elif not is_ignored(name, model.config):
            surplus.append(key)
    if (
        _HEAD not in expected
        and (head := tensors.pop(_HEAD, None))
        and not same(head, tensors.setdefault(_EMBEDDING, head))
    ):
        wrong.append(
            f"{_HEAD} differs from the embedding, but config.json ties them (tie_word_embeddings)"
        )
    for name, stored in tensors.items():
        dtype_fits = (
            buffers[name] == TYPES.get(stored.dtype) if name in buffers else stored.dtype in FLOATS
        )
        if stored.shape != expected[name]:
            wrong.append(f"{name} is {list(stored.shape)} instead of {list(expected[name])}")
        elif not dtype_fits:
            wrong.append(f"{name} is of type {stored.dtype}, quantized tensors are not supported")
    missing = sorted(expected.keys() - tensors.keys())
    if missing or surplus or wrong:
        kinds = (("missing", missing), ("surplus", surplus), ("misshapen", wrong))
        raise CheckpointError(
            f"the tensors in {checkpoint.folder} do not fit its config.json: "
            + "; ".join(_summary(*kind) for kind in kinds if kind[1])
        )
    return tensors


def _summary(kind: str, names: list[str]) -> str:
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{len(names)} {kind}: {', '.join(names[:8])}{rest}"


def get_device(name: str) -> torch.device:
    """A device by name. Raises `OptionError` or `Unsupported` where it is not available."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"unknown device {name!r}; use cpu, cuda, cuda:1 or mps") from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type):
        raise Unsupported(
            f"torch {torch.__version__} has no {device.type} device on this machine; use device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Unsupported(
            f"{device} does not exist: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return device
