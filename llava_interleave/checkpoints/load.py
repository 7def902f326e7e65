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
from ..kernels import PANEL
from ..model import Llava
from ..quantization import linear_cuda
from ..quantization.linear_cpu import QuantizedLinear
from ..quantization.linear_cuda import Float8Linear, NF4Linear
from ..quantization.packing import pack
from ..quantization.precision import CUDA_ONLY
from ..quantization.replace import pack_for_cuda, replace_linears
from .files import read_config, read_headers, stored_precision
from .layouts import ours, unused
from .safetensors_file import FLOATS, TYPES, Reader, Stored, same

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EMBEDDING, _HEAD = "language_model.embed_tokens.weight", "lm_head.weight"


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    precision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Llava:
    """The network of a checkpoint folder, ready to answer: no gradients, evaluation mode.

    dtype: float32, bfloat16 or float16; None takes the type that the embedding is stored in.
    precision: int4 or int8, or these with parts apart (`model.quantize.parts`), quantizes linears while they are read, a few rows
    at a time, fp8 or nf4 (on a CUDA GPU) one after another; `dtype` is then what is computed in. A folder that is quantized
    already is loaded as it is.
    progress: called with the bytes read so far and in all.
    Weights in their stored type on the CPU are the mapped file (see `Reader`): do not change the files in place meanwhile.
    Others, and all on a GPU, come through a buffer of 4 MB, one tensor after another.
    Missing, surplus and misshapen tensors are listed together in one `CheckpointError`.
    """
    folder = Path(folder)
    place = device_named(device)
    held = stored_precision(folder)
    if held and precision not in (None, held):
        raise OptionError(
            f"{folder} holds {held} weights; for {precision} quantize the checkpoint that it was made from"
        )
    model = blank(read_config(folder), held)
    found = match(model, read_headers(folder), folder)
    dtype = dtype or FLOATS[found[_EMBEDDING].dtype]
    if dtype == torch.float64:
        dtype = torch.float32
    if dtype not in DTYPES:
        raise OptionError(
            f"weights are held as {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not {dtype}"
        )
    if held or precision:
        linear_cuda.check_supported(str(held or precision), place)
    packed = {name: value.dtype for name, value in model.named_buffers()}
    plan = replace_linears(model, precision) if precision and not held else set()
    total, done = sum(stored.bytes for stored in found.values()), 0
    state: dict[str, Tensor] = {}
    in_order = sorted(found.items(), key=lambda item: (item[1].path, item[1].start))
    for path, group in groupby(in_order, key=lambda item: item[1].path):
        with path.open("rb", buffering=0) as file:
            reader = Reader(file)
            for name, stored in group:
                if (linear := name.removesuffix(".weight")) in plan:
                    state |= quantized(reader, stored, linear, model.get_submodule(linear), place)
                else:
                    state[name] = reader.read(stored, packed.get(name, dtype), place)
                if (
                    name == _EMBEDDING
                    and "lm_head" in plan
                    and model.config.text.tie_word_embeddings
                ):
                    state |= quantized(reader, stored, "lm_head", model.lm_head, place)
                done += stored.bytes
                if progress:
                    progress(done, total)
    model.load_state_dict(state, strict=False, assign=True)
    if isinstance(model.lm_head, nn.Linear):  # a quantized head is a matrix of its own
        model.tie()
    state.clear()  # what is put into another order goes as it is replaced
    if (held or precision) and linear_cuda.unavailable_reason(place, dtype) is None:
        pack_for_cuda(model)
    assert {value.device.type for value in model.state_dict().values()} == {place.type}
    return model.requires_grad_(False).eval()


def quantized(
    reader: Reader, stored: Stored, name: str, linear: nn.Module, place: torch.device
) -> dict[str, Tensor]:
    """Weight and scale of a linear, quantized where they go, int4 and int8 a few rows at a time, so that the floats are never all
    in memory."""
    if isinstance(linear, Float8Linear | NF4Linear):
        weight, scale = linear.pack(reader.read(stored, FLOATS[stored.dtype], place))
        return {f"{name}.weight": weight, f"{name}.scale": scale}
    assert isinstance(linear, QuantizedLinear)
    weight, scale = (
        torch.empty_like(linear.weight, device=place),
        torch.empty_like(linear.scale, device=place),
    )
    panel = 0
    for rows in reader.rows(stored, PANEL):
        w, s = pack(rows.to(place), linear.bits)
        weight[panel : panel + len(w)], scale[panel : panel + len(w)] = w, s
        panel += len(w)
    return {f"{name}.weight": weight, f"{name}.scale": scale}


class _Uninitialised(TorchFunctionMode):
    """Leaves out random initialisation: what `normal_` does on the meta device imports torch's compiler, 2 s for nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is torch.nn.init.normal_ else func(*args, **kwargs)


def skeleton(config: LlavaConfig) -> Llava:
    """The network with shapes and no memory (on the meta device)."""
    with _Uninitialised(), torch.device("meta"):
        return Llava(config)


def blank(config: LlavaConfig, precision: str | None) -> Llava:
    """`skeleton`, quantized where a precision is given."""
    model = skeleton(config)
    if precision:
        replace_linears(model, precision)
    return model


def shapes(model: Llava) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of the network holds; a head that is the embedding is not listed."""
    tied = model.config.text.tie_word_embeddings and isinstance(model.lm_head, nn.Linear)
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if not (tied and name == _HEAD)
    }


def size(
    config: LlavaConfig, dtype: torch.dtype, precision: str | None = None, device: str = "cpu"
) -> int:
    """Bytes of a network on `device` whose numbers are of type `dtype` and whose linears are quantized to `precision`."""
    model = blank(config, precision)
    few = sum(value.nbytes for value in model.buffers())
    if (
        precision
        and precision not in CUDA_ONLY
        and linear_cuda.unavailable_reason(torch.device(device), dtype) is None
    ):
        few = sum(
            linear_cuda.packed_bytes(module)
            for module in model.modules()
            if isinstance(module, QuantizedLinear)
        )
    return few + sum(p.numel() for p in model.parameters()) * dtype.itemsize


def match(model: Llava, headers: dict[str, Stored], folder: Path) -> dict[str, Stored]:
    """Our name -> stored tensor, for every tensor of the network; all that does not fit is in one `CheckpointError`."""
    expected = shapes(model)
    packed = {name: value.dtype for name, value in model.named_buffers()}
    found: dict[str, Stored] = {}
    surplus: list[str] = []
    wrong: list[str] = []
    for stored_name, stored in headers.items():
        name = ours(stored_name)
        if name in found:
            wrong.append(f"{stored_name} is a second {name}")
        elif name in expected or name == _HEAD:
            found[name] = stored
        elif not unused(name, model.config):
            surplus.append(stored_name)
    if (
        _HEAD not in expected
        and (head := found.pop(_HEAD, None))
        and not same(head, found.setdefault(_EMBEDDING, head))
    ):
        wrong.append(
            f"{_HEAD} differs from the embedding, but config.json ties them (tie_word_embeddings)"
        )
    for name, stored in found.items():
        if stored.shape != expected[name]:
            wrong.append(f"{name} is {list(stored.shape)} instead of {list(expected[name])}")
        elif (
            packed[name] != TYPES.get(stored.dtype)
            if name in packed
            else stored.dtype not in FLOATS
        ):
            wrong.append(f"{name} is of type {stored.dtype}, quantized tensors are not read")
    missing = sorted(expected.keys() - found.keys())
    if missing or surplus or wrong:
        kinds = (("missing", missing), ("surplus", surplus), ("misshapen", wrong))
        raise CheckpointError(
            f"the tensors in {folder} do not fit its config.json: "
            + "; ".join(_list(*k) for k in kinds if k[1])
        )
    return found


def _list(kind: str, names: list[str]) -> str:
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{len(names)} {kind}: {', '.join(names[:8])}{rest}"


def device_named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"{name!r} is no device; give cpu, cuda, cuda:1 or mps") from error
    ready = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not ready.get(device.type):
        raise Unsupported(
            f"this torch ({torch.__version__}) has no {device.type} device here; device='cpu' always works"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Unsupported(
            f"there is no {device}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return device
