"""LoRA adapters on the linears of a finished network (Hu et al. 2021, arXiv 2106.09685), also DoRA.

A network can carry several adapters. The thread that calls the network says which rows of a batch
go through which one, so a batch may mix them; rows without an adapter cost nothing more.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from .config import LoraConfig
from .errors import OptionError
from .model.llava import Llava

Spans = Sequence[tuple[str, slice]]
"""Keys of adapters, and the rows that go through each: tokens in the decoder, crops in tower and
projector."""


class LoraWeights(nn.Module):
    """x `[..., in]` -> scale * B A x `[..., out]`, in the type of A `[rank, in]` and B `[out,
    rank]`.

    magnitude: of DoRA (Liu et al. 2024, arXiv 2402.09353), `[out]`; None: LoRA. gain: then the
    factor `[out]` on the adapted product, magnitude / |W + scale * B A| per output.
    """

    magnitude: Tensor | None
    gain: Tensor | None

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        lora: LoraConfig,
        *,
        alpha: float | None = None,
        magnitude: Tensor | None = None,
        train: bool = False,
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a, requires_grad=train), nn.Parameter(b, requires_grad=train)
        self.alpha = lora.alpha if alpha is None else alpha
        self.scale, self.dropout = replace(lora, alpha=self.alpha).scale(len(a)), lora.dropout
        if train and magnitude is not None:
            self.magnitude = nn.Parameter(magnitude)
        else:
            self.register_buffer("magnitude", magnitude)
        self.register_buffer("gain", None, persistent=False)

    def train(self, mode: bool = True) -> Self:
        if self.a.requires_grad:  # it changes
            self.gain = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.low(self.dropped(x))

    def dropped(self, x: Tensor) -> Tensor:
        """The inputs after dropout."""
        if not torch.is_autocast_enabled(x.device.type):  # which casts by itself
            x = x.to(self.a.dtype)
        return dropout(x, self.dropout, self.training)

    def low(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.a) * self.scale, self.b)  # scaled where it is narrow

    def dora(self, base: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """DoRA's outputs, of the inputs x and the outputs y of the linear `base`.

        In training the norm |W + scale * B A| is a constant (section 4.3 of the paper), and where
        inputs are dropped, only what the adapter changes is computed from the rest, as PEFT does.
        """
        gain = self.gain
        if gain is None:
            assert self.magnitude is not None
            gain = (self.magnitude / self.norm(base)).to(self.a.dtype)
            if not self.training and not torch.is_grad_enabled():
                self.gain = gain  # the same for every token
        bias = getattr(base, "bias", None)
        bias = 0 if bias is None else bias
        x = self.dropped(x)
        if self.training and self.dropout:
            return y + (gain - 1) * (base(x) - bias) + gain * self.low(x)
        return gain * (y - bias + self.low(x)) + bias

    @torch.no_grad()
    def product(self) -> Tensor:
        """scale * B A, float32: what is added to the weight."""
        return self.b.float() @ self.a.float() * self.scale

    @torch.no_grad()
    def norm(self, base: nn.Module) -> Tensor:
        """|W + scale * B A| `[out]` for the linear `base`, float32."""
        with torch.autocast(self.a.device.type, enabled=False):
            return (_weight(base) + self.product()).norm(dim=1)

    @torch.no_grad()
    def set_gain(self, base: nn.Module) -> None:
        """Compute the DoRA gain for the linear `base`; without a magnitude there is none."""
        if self.magnitude is not None:
            self.gain = (self.magnitude.float() / self.norm(base)).to(self.a.dtype)


def _weight(base: nn.Module) -> Tensor:
    """The weight of a linear, of a quantized one what it stands for, float32."""
    dequantize = getattr(base, "dequantize", None)
    weight = base.weight if dequantize is None else dequantize()
    assert isinstance(weight, Tensor)
    return weight.detach().float()


class ReplacedLinear(nn.Module):
    """A linear that an adapter brings along as a whole (PEFT's `modules_to_save`)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensors["weight"], requires_grad=False)
        bias = tensors.get("bias")
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """An adapter: its low-rank matrices, by the name of their linear.

    replaced: tensors of whole modules (PEFT's `modules_to_save`), by module and name.
    """

    lora: LoraConfig
    parts: Mapping[str, LoraWeights]
    replaced: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


class AdapterRouting(threading.local):
    """Which rows go through which adapter, per thread; `spans` is the default."""

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
    """A linear with adapters: W x + b, plus scale * B A x for the rows of each adapter."""

    def __init__(self, base: nn.Module, route: AdapterRouting) -> None:
        super().__init__()
        self.base, self.route = base, route
        self.low = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for key, rows in self.route.spans:
            if key not in self.low:
                continue
            part = self.low[key]
            if isinstance(part, ReplacedLinear):
                y[rows] = part(x[rows]).to(y.dtype)
            elif isinstance(part, LoraWeights) and part.magnitude is not None:
                y[rows] = part.dora(self.base, x[rows], y[rows]).to(y.dtype)
            elif rows == slice(None):
                y = (y + part(x)).to(y.dtype)  # autograd copies both for every slice
            else:
                y[rows].add_(part(x[rows]))
        return y


def linears(network: Llava) -> dict[str, nn.Module]:
    """The linears that can have adapters, by name: all but the output head, which may be tied.

    Of any kind with `in_features` and `out_features`; of one with adapters its base.
    """
    modules = ((name.removesuffix(".base"), module) for name, module in network.named_modules())
    return {
        name: module
        for name, module in modules
        if hasattr(module, "in_features") and name != "lm_head"
    }


def attach(network: Llava, lora: LoraConfig, seed: int = 0) -> LoraAdapter:
    """Add a new adapter, float32, to the linears that `lora` targets, for training.

    All rows go through it, and only its matrices (of DoRA with magnitudes) and the modules of
    `modules_to_save` are trained. A is uniform within 1 / sqrt(in) and B is 0: it changes nothing
    at first. The weights may be quantized (QLoRA, Dettmers et al. 2023, arXiv 2305.14314); those of
    `modules_to_save` become floats. Raises `OptionError` for a pattern that matches nothing, and
    for a linear that is to have matrices and to be trained whole.
    """
    network.requires_grad_(False)
    modules = linears(network)
    targets = [n for n in modules if any(fnmatchcase(n, pattern) for pattern in lora.targets)]
    for pattern in lora.patterns:
        among = list(modules) if pattern in lora.targets else targets
        if not any(fnmatchcase(name, pattern) for name in among):
            raise OptionError(f"no linear matches {pattern!r}; there are {_kinds(among)}")
    replaced = _train_whole(network, lora.modules_to_save)
    if both := next((name for name in targets if name in replaced), None):
        raise OptionError(
            f"adapter.targets and adapter.modules_to_save both have {both}: leave it out of one"
        )
    device = network.language_model.norm.weight.device
    random = torch.Generator().manual_seed(seed)
    parts = {}
    for name in targets:
        module, rank = modules[name], lora.rank_of(name)
        inputs, outputs = module.in_features, module.out_features
        assert isinstance(inputs, int) and isinstance(outputs, int)
        a = (torch.rand(rank, inputs, generator=random) * 2 - 1) / math.sqrt(inputs)
        parts[name] = LoraWeights(
            a.to(device),
            torch.zeros(outputs, rank, device=device),
            lora,
            alpha=lora.alpha_of(name),
            magnitude=_weight(module).norm(dim=1) if lora.dora else None,
            train=True,
        )
    install(network, LoraAdapter(lora, parts), "own", AdapterRouting([("own", slice(None))]))
    return LoraAdapter(lora, parts, replaced)


def _kinds(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))


def _train_whole(network: Llava, patterns: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Train the modules that match, float32. -> their parameters, by module and name."""
    found: dict[str, dict[str, Tensor]] = {}
    for pattern in patterns:
        names = [name for name, _ in network.named_modules() if name and fnmatchcase(name, pattern)]
        if not names:
            kinds = _kinds(name for name, _ in network.named_modules() if name)
            raise OptionError(f"no module matches {pattern!r}; there are {kinds}")
        if any(name in _TIED for name in names):
            _untie(network)
        inside = [
            (f"{name}.{inner}".strip("."), module)
            for name in names
            for inner, module in network.get_submodule(name).named_modules()
        ]
        for name, module in dict(inside).items():
            if hasattr(module, "dequantize"):  # quantized
                weight, bias = _weight(module), getattr(module, "bias", None)
                outputs, inputs = weight.shape
                whole = nn.Linear(inputs, outputs, bias=bias is not None, device=weight.device)
                whole.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
                network.set_submodule(name, module := whole)
            for key, parameter in module.named_parameters(recurse=False):
                parameter.data = parameter.data.float()
                found.setdefault(name, {})[key] = parameter.requires_grad_(True)
    return found


_TIED = ("lm_head", "language_model.embed_tokens")


def install(network: Llava, adapter: LoraAdapter, key: str, route: AdapterRouting) -> None:
    """Add an adapter to the linears of a network; rows go through it where `route` has its key.

    Raises `OptionError` for an adapter that replaces other modules than linears.
    """
    modules = linears(network)
    if others := sorted(adapter.replaced.keys() - modules.keys()):
        raise OptionError(
            f"the adapter replaces {', '.join(others)} for all requests; merge it into a "
            "checkpoint first (llava convert --adapter)"
        )
    own: dict[str, nn.Module] = {n: ReplacedLinear(t) for n, t in adapter.replaced.items()}
    for name, part in (own | dict(adapter.parts)).items():
        if isinstance(part, LoraWeights):
            part.set_gain(modules[name])
        module = network.get_submodule(name)
        if not isinstance(module, LoraLinear):
            module = LoraLinear(module, route).train(module.training)
            network.set_submodule(name, module)
        assert module.route is route, "one set of adapters per network"
        module.low[key] = part.train(module.training)


@torch.no_grad()
def merge(network: Llava, adapter: LoraAdapter) -> None:
    """Merge an adapter into the weights of a network without adapters, in float32."""
    for name, part in adapter.parts.items():
        module = network.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise OptionError(
                f"{name} is a {type(module).__name__}: an adapter is merged into float weights only"
            )
        part.set_gain(module)
        weight = module.weight.float() + part.product()
        module.weight.copy_(weight if part.gain is None else part.gain.float()[:, None] * weight)
    if set(_TIED) & adapter.replaced.keys():
        _untie(network)
    for name, tensors in adapter.replaced.items():
        for key, tensor in tensors.items():
            network.get_parameter(f"{name}.{key}").copy_(tensor)


def _untie(network: Llava) -> None:
    """Give a tied output head a weight of its own."""
    text = network.config.text
    if text.tie_word_embeddings:
        text = replace(text, tie_word_embeddings=False)
        network.config = replace(network.config, text=text)
        network.language_model.config = text
        if isinstance(network.lm_head, nn.Linear):  # a quantized one has a copy already
            weight = network.lm_head.weight.detach().clone()
            network.lm_head.weight = nn.Parameter(weight, requires_grad=False)


class Adapters:
    """The adapters of one network, by name; none at first. Adding is safe while threads compute."""

    def __init__(self, network: Llava) -> None:
        self.network, self.route = network, AdapterRouting()
        self._keys: dict[str, tuple[str, str]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._keys)

    def add(self, name: str, adapter: LoraAdapter) -> None:
        """Add an adapter to the network's linears, to be selected by `name`."""
        if name in self._keys:
            raise OptionError(f"an adapter {name!r} exists already; give this one another name")
        key = str(len(self._keys))
        install(self.network, adapter, key, self.route)
        modules = [*adapter.parts, *adapter.replaced]
        affects_images = any(not module.startswith("language_model.") for module in modules)
        self._keys[name] = key, key if affects_images else ""

    def keys(self, name: str | None) -> tuple[str, str]:
        """Keys of the adapter for tokens, and of the one for images; "" is the base network."""
        if name is None:
            return "", ""
        if name not in self._keys:
            raise OptionError(
                f"unknown adapter {name!r}; loaded are: "
                f"{', '.join(map(repr, self._keys)) or 'none'}"
            )
        return self._keys[name]

    @contextmanager
    def whole(self, name: str | None) -> Iterator[None]:
        """Within it, everything that this thread computes goes through one adapter."""
        key, _ = self.keys(name)
        with self.route.through([(key, slice(None))] if key else ()):
            yield
