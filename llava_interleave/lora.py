"""Adapters: low-rank matrices beside the linears of a finished network (LoRA, Hu et al. 2021, arXiv 2106.09685).

A network can carry several. Which rows of a batch go through which is said by the thread that calls the network, so that a
batch may mix them; rows that no adapter has cost nothing more than the network alone.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from .config import LoraConfig
from .errors import OptionError
from .model.llava import Llava

Spans = Sequence[tuple[str, slice]]
"""Keys of adapters, and the rows that go through each: of tokens in the decoder, of crops in tower and projector."""


class LoraWeights(nn.Module):
    """x `[..., in]` -> scale * B A x `[..., out]`, in the type of A `[rank, in]` and B `[out, rank]`."""

    def __init__(self, a: Tensor, b: Tensor, lora: LoraConfig, *, train: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a, requires_grad=train), nn.Parameter(b, requires_grad=train)
        self.scale, self.dropout = lora.scale(len(a)), lora.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = dropout(x.to(self.a.dtype), self.dropout, self.training)
        return linear(linear(x, self.a) * self.scale, self.b)  # scaled where it is narrow

    @torch.no_grad()
    def product(self) -> Tensor:
        """scale * B A, float32: what the weight of the linear would have more."""
        return self.b.float() @ self.a.float() * self.scale


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """The low-rank matrices of one adapter, by the name of the linear that each stands beside."""

    lora: LoraConfig
    parts: Mapping[str, LoraWeights]


class AdapterRouting(threading.local):
    """Which rows go through which adapter, in the thread that asks; `spans` where it has not said."""

    def __init__(self, spans: Spans = ()) -> None:
        self.spans = spans

    @contextmanager
    def through(self, spans: Spans) -> Iterator[None]:
        before, self.spans = self.spans, spans
        try:
            yield
        finally:
            self.spans = before


class LoraLinear(nn.Module):
    """A linear with the low-rank matrices of adapters beside it: W x + b, and + scale B A x for the rows of each."""

    def __init__(self, base: nn.Module, route: AdapterRouting) -> None:
        super().__init__()
        self.base, self.route = base, route
        self.low = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for key, rows in self.route.spans:
            if key in self.low:
                y[rows].add_(self.low[key](x[rows]))
        return y


def linears(network: Llava) -> dict[str, nn.Module]:
    """What adapters can stand beside, by name: every linear but the output head, which may be the embedding.

    Of whatever kind: what has `in_features` and `out_features` is one. One that has adapters is meant without them.
    """
    found = ((name.removesuffix(".base"), module) for name, module in network.named_modules())
    return {
        name: module
        for name, module in found
        if hasattr(module, "in_features") and name != "lm_head"
    }


def attach(network: Llava, lora: LoraConfig, seed: int = 0) -> LoraAdapter:
    """Put a fresh adapter, float32, beside the linears that `lora` targets. Every row goes through it, and it alone trains.

    A is uniform within 1 / sqrt(in), B nought: the network computes what it did until B has been changed. The weights may be
    quantized (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). Raises `OptionError` for a pattern that no linear has.
    """
    found = linears(network)
    for pattern in lora.targets or ("",):
        if not any(fnmatchcase(name, pattern) for name in found):
            kinds = ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in found))
            raise OptionError(f"no linear is called {pattern!r}; there are {kinds}")
    device = network.language_model.norm.weight.device
    random = torch.Generator().manual_seed(seed)
    parts = {}
    for name, module in found.items():
        if any(fnmatchcase(name, pattern) for pattern in lora.targets):
            inputs, outputs = module.in_features, module.out_features
            assert isinstance(inputs, int) and isinstance(outputs, int)
            a = (torch.rand(lora.rank, inputs, generator=random) * 2 - 1) / math.sqrt(inputs)
            parts[name] = LoraWeights(
                a.to(device), torch.zeros(outputs, lora.rank, device=device), lora, train=True
            )
    adapter = LoraAdapter(lora, parts)
    network.requires_grad_(False)
    install(network, adapter, "own", AdapterRouting([("own", slice(None))]))
    return adapter


def install(network: Llava, adapter: LoraAdapter, key: str, route: AdapterRouting) -> None:
    """Put an adapter beside the linears of a network; rows go through it where `route` has its key."""
    for name, part in adapter.parts.items():
        module = network.get_submodule(name)
        if not isinstance(module, LoraLinear):
            module = LoraLinear(module, route).train(module.training)
            network.set_submodule(name, module)
        assert module.route is route, "one set of adapters a network"
        module.low[key] = part.train(module.training)


@torch.no_grad()
def merge(network: Llava, adapter: LoraAdapter) -> None:
    """Add an adapter to the weights of a network that carries none, in float32: no matrices are left beside them."""
    for name, part in adapter.parts.items():
        module = network.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise OptionError(
                f"{name} is a {type(module).__name__}: an adapter is merged into float weights only"
            )
        module.weight.copy_(module.weight.float() + part.product())


class Adapters:
    """The adapters of one network, by name; none at first. They can be added while other threads compute."""

    def __init__(self, network: Llava) -> None:
        self.network, self.route = network, AdapterRouting()
        self._keys: dict[str, tuple[str, str]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._keys)

    def add(self, name: str, adapter: LoraAdapter) -> None:
        """Put an adapter beside the network's linears, to be chosen by `name`."""
        if name in self._keys:
            raise OptionError(f"there is an adapter {name!r} already; give this one another name")
        key = str(len(self._keys))
        install(self.network, adapter, key, self.route)
        pictures = any(not part.startswith("language_model.") for part in adapter.parts)
        self._keys[name] = key, key if pictures else ""

    def keys(self, name: str | None) -> tuple[str, str]:
        """Keys of the adapter that tokens go through, and of the one that pictures do; "" is the network alone."""
        if name is None:
            return "", ""
        if name not in self._keys:
            raise OptionError(
                f"there is no adapter {name!r} here; there are: {', '.join(map(repr, self._keys)) or 'none'}"
            )
        return self._keys[name]

    @contextmanager
    def whole(self, name: str | None) -> Iterator[None]:
        """Within it, all that this thread computes with the network goes through one adapter."""
        key, _ = self.keys(name)
        with self.route.through([(key, slice(None))] if key else ()):
            yield
