"""Load a network for tensor parallelism over the processes that torchrun started."""

from __future__ import annotations

import torch.distributed as dist

from .. import checkpoints
from ..checkpoints import Checkpoint
from ..checkpoints.load import get_device
from ..errors import Unsupported
from ..kernels import triton
from ..model import Llava
from ..placement import pick_precision
from ..quantization.precision import CUDA_ONLY
from ..quantization.replace import pack_for_cuda
from .process_group import init_distributed
from .tensor_parallel import TensorParallelGroup, shard_model


def load_shard(
    checkpoint: Checkpoint, precision: str, device: str, *, batch_invariant: bool
) -> tuple[Llava, TensorParallelGroup]:
    """This rank's shard of a checkpoint's network, on its own device; the arguments are those of
    `load`.

    The files are mapped, so tensors of other ranks are not read unless they are converted. A weight
    that is quantized while loading is whole in memory for a moment. Raises `Unsupported` for
    options that tensor parallelism does not have."""
    if dist.is_initialized():
        raise Unsupported(
            "this torchrun has loaded a tensor-parallel network already; load one network per run"
        )
    if batch_invariant:
        raise Unsupported(
            "batch_invariant needs one process: an all-reduce over several adds in no fixed order"
        )
    group, own = init_distributed(device, get_device)
    dtype, bits = pick_precision(precision, checkpoint, str(own))
    if bits in CUDA_ONLY:
        group.raise_everywhere(
            Unsupported(
                f"{bits} is not supported under tensor parallelism (world size "
                f"{group.world_size}); "
                "use bfloat16, int8 or int4"
            )
        )
    stored = {tensor.dtype for tensor in checkpoint.headers.values()}
    network = checkpoints.load(
        checkpoint, dtype=None if len(stored) == 1 and not bits else dtype, precision=bits
    )
    tp_group = shard_model(network, group, own, dtype)
    if bits and triton.unavailable_reason(own, dtype) is None:
        pack_for_cuda(network)
    return network, tp_group
