"""A checkpoint folder becomes a network: every tensor straight to its type and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..config import LlavaConfig
from ..errors import CheckpointError, OptionError, Unsupported
from ..model import Llava
from .files import read_config, read_headers
from .layouts import ours, unused
from .tensors import FLOATS, Reader, Stored, same

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EMBEDDING, _HEAD = "language_model.embed_tokens.weight", "lm_head.weight"


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Llava:
    """The network of a checkpoint folder, ready to answer: no gradients, evaluation mode.

    dtype: float32, bfloat16 or float16; None takes the type that the embedding is stored in.
    progress: called with the bytes read so far and in all.
    Weights in their stored type on the CPU are the mapped file (see `Reader`): do not change the files in place meanwhile.
    Missing, surplus and misshapen tensors are listed together in one `CheckpointError`.
    """
    folder = Path(folder)
    place = _device(device)
    model = skeleton(read_config(folder))
    found = match(model, read_headers(folder), folder)
    dtype = dtype or FLOATS[found[_EMBEDDING].dtype]
    if dtype == torch.float64:
        dtype = torch.float32
    if dtype not in DTYPES:
        raise OptionError(f"weights are held as {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not {dtype}")
    total, done = sum(stored.bytes for stored in found.values()), 0
    state: dict[str, Tensor] = {}
    in_order = sorted(found.items(), key=lambda item: (item[1].path, item[1].start))
    for path, group in groupby(in_order, key=lambda item: item[1].path):
        with path.open("rb", buffering=0) as file:
            reader = Reader(file)
            for name, stored in group:
                state[name] = reader.read(stored, dtype, place)
                done += stored.bytes
                if progress:
                    progress(done, total)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    assert not any(p.is_meta for p in model.parameters())
    return model.requires_grad_(False).eval()


class _Uninitialised(TorchFunctionMode):
    """Leaves out random initialisation: what `normal_` does on the meta device imports torch's compiler, 2 s for nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is torch.nn.init.normal_ else func(*args, **kwargs)


def skeleton(config: LlavaConfig) -> Llava:
    """The network with shapes and no memory (on the meta device)."""
    with _Uninitialised(), torch.device("meta"):
        return Llava(config)


def shapes(model: Llava) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of the network holds; a tied head is the embedding and not listed."""
    tied = model.config.text.tie_word_embeddings
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if not (tied and name == _HEAD)}


def match(model: Llava, headers: dict[str, Stored], folder: Path) -> dict[str, Stored]:
    """Our name -> stored tensor, for every tensor of the network; all that does not fit is in one `CheckpointError`."""
    expected = shapes(model)
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
    if _HEAD not in expected and (head := found.pop(_HEAD, None)) and not same(head, found.setdefault(_EMBEDDING, head)):
        wrong.append(f"{_HEAD} differs from the embedding, but config.json ties them (tie_word_embeddings)")
    for name, stored in found.items():
        if stored.shape != expected[name]:
            wrong.append(f"{name} is {list(stored.shape)} instead of {list(expected[name])}")
        elif stored.dtype not in FLOATS:
            wrong.append(f"{name} is of type {stored.dtype}, quantised tensors are not read")
    missing = sorted(expected.keys() - found.keys())
    if missing or surplus or wrong:
        kinds = (("missing", missing), ("surplus", surplus), ("misshapen", wrong))
        raise CheckpointError(
            f"the tensors in {folder} do not fit its config.json: " + "; ".join(_list(*k) for k in kinds if k[1])
        )
    return found


def _list(kind: str, names: list[str]) -> str:
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{len(names)} {kind}: {', '.join(names[:8])}{rest}"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"{name!r} is no device; give cpu, cuda, cuda:1 or mps") from error
    ready = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not ready.get(device.type):
        raise Unsupported(f"this torch ({torch.__version__}) has no {device.type} device here; device='cpu' always works")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Unsupported(f"there is no {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
