"""Replace the linears of a finished network by quantized ones, and tell which precision a network
has."""

from __future__ import annotations

import torch
from torch import nn

from ..model.llava import Llava
from .linear_cpu import QuantizedLinear, QuantizedLinearBase
from .linear_cuda import Float8Linear, NF4Linear, TritonLinear
from .precision import COMPONENTS, CUDA_ONLY, KINDS, bits_per_linear, component_of, format_precision


def replace_linears(network: Llava, precision: str) -> set[str]:
    """Replace linears by quantized ones without values, on the same device; -> their names.

    fp8 and nf4 replace every linear but the output head.
    """
    bits = {} if precision in CUDA_ONLY else bits_per_linear(network, precision)
    names = bits or [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    for name in names:
        old = network.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new: QuantizedLinearBase
        with torch.device(old.weight.device):
            size = old.in_features, old.out_features
            if bits:
                new = QuantizedLinear(*size, bits[name], bias=old.bias is not None)
            else:
                make = Float8Linear if precision == "fp8" else NF4Linear
                new = make(*size, bias=old.bias is not None)
        network.set_submodule(name, new)
    return set(names)


def pack_for_cuda(network: Llava) -> None:
    """Replace every `QuantizedLinear` of a network on a GPU by a `TritonLinear`, one at a
    time."""
    linears = [(n, m) for n, m in network.named_modules() if isinstance(m, QuantizedLinear)]
    while linears:
        name, linear = linears.pop()
        network.set_submodule(name, TritonLinear.repack(linear))


def quantized_precision(network: Llava) -> str | None:
    """The precision that a network was quantized to; None for floats."""
    kinds = {
        component_of(name): module.kind
        for name, module in network.named_modules()
        if isinstance(module, QuantizedLinearBase)
    }
    if not kinds or (cuda_only := kinds.values() - KINDS.keys()):
        return min(cuda_only) if kinds else None
    return format_precision({name: KINDS[kinds.get(name, "float")] for name in COMPONENTS})
