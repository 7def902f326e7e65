"""A network over the processes that torchrun has started, one share each."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from .. import weights
from ..errors import Unsupported
from ..model import Llava, gpu
from ..model.parallel import Together, split
from ..model.ranks import joined
from ..weights.files import read_headers
from ..weights.load import device_named
from .place import pick_precision


def share(folder: Path, precision: str, device: str, *, deterministic: bool) -> tuple[Llava, Together]:
    """This process's share of a checkpoint's network, on a device of its own; the arguments are those of `load`.

    The files are mapped, and what others keep is not read where the type stays; only weights that are quantised here are whole in
    memory for a moment. Raises `Unsupported` for what several processes cannot do.
    """
    if dist.is_initialized():
        raise Unsupported("the processes of this torchrun share a network already: one a run")
    if deterministic:
        raise Unsupported("several processes add in no fixed order: deterministic answers take one process")
    ranks, place = joined(device, device_named)
    dtype, bits = pick_precision(precision, folder, str(place))
    if bits in gpu.FLOATS:
        raise ranks.common(Unsupported(f"no {bits} over several processes: take bfloat16, int8 or int4"))
    stored = {tensor.dtype for tensor in read_headers(folder).values()}
    network = weights.load(folder, dtype=None if len(stored) == 1 and not bits else dtype, precision=bits)
    together = split(network, ranks, place, dtype)
    if bits and gpu.why_not(place, dtype) is None:
        gpu.tile(network)
    return network, together
