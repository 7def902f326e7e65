"""A network over the processes that torchrun has started, one share each."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from .. import checkpoints
from ..checkpoints.files import read_headers
from ..checkpoints.load import device_named
from ..errors import Unsupported
from ..model import Llava
from ..placement import pick_precision
from ..quantization import cuda
from .process_group import init_distributed
from .tensor_parallel import TensorParallelGroup, shard_model


def share(
    folder: Path, precision: str, device: str, *, deterministic: bool
) -> tuple[Llava, TensorParallelGroup]:
    """This process's share of a checkpoint's network, on a device of its own; the arguments are those of `load`.

    The files are mapped, and what others keep is not read where the type stays; only weights that are quantised here are whole in
    memory for a moment. Raises `Unsupported` for what several processes cannot do.
    """
    if dist.is_initialized():
        raise Unsupported("the processes of this torchrun share a network already: one a run")
    if deterministic:
        raise Unsupported(
            "several processes add in no fixed order: deterministic answers take one process"
        )
    ranks, place = init_distributed(device, device_named)
    dtype, bits = pick_precision(precision, folder, str(place))
    if bits in cuda.FLOATS:
        raise ranks.common(
            Unsupported(f"no {bits} over several processes: take bfloat16, int8 or int4")
        )
    stored = {tensor.dtype for tensor in read_headers(folder).values()}
    network = checkpoints.load(
        folder, dtype=None if len(stored) == 1 and not bits else dtype, precision=bits
    )
    together = shard_model(network, ranks, place, dtype)
    if bits and cuda.unavailable_reason(place, dtype) is None:
        cuda.pack_for_cuda(network)
    return network, together
