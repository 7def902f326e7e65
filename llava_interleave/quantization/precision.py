"""Names of precisions: `int4,head=int4` -> bits of every linear of a network. Holds no weights."""

from __future__ import annotations

from torch import nn

from ..model.llava import Llava

COMPONENTS = {
    "tower": ("vision_tower.", "multi_modal_projector."),
    "decoder": ("language_model.",),
    "head": ("lm_head",),
}
"""Prefixes of the names of a component's linears."""
KINDS = {"int4": 4, "int8": 8, "float": 0}
"""Bits of the weights of a component's linears; 0: they stay floats."""
RECIPES = {
    "int8": {"tower": 8, "decoder": 8, "head": 8},
    "int4": {"tower": 8, "decoder": 4, "head": 8},
}
"""Bits per component, by precision. All tensors other than linears' weights stay as they are."""
PER_COMPONENT = "int4,head=int4"
"""Example of a precision that sets a component; several are possible."""
CUDA_ONLY = ("fp8", "nf4")
"""Precisions without a CPU form and without a stored form."""


def parse_precision(precision: str) -> dict[str, int] | None:
    """Bits per component of one of `RECIPES`, with components set apart as in `int8,tower=float`.

    None where the name is unknown, or leaves every component in floats.
    """
    recipe, *settings = precision.split(",")
    bits = dict(RECIPES.get(recipe, {}))
    for component, _, kind in (setting.partition("=") for setting in settings):
        if component not in bits or kind not in KINDS:
            return None
        bits[component] = KINDS[kind]
    return bits if any(bits.values()) else None


def format_precision(bits: dict[str, int]) -> str:
    """The canonical name of bits per component, as `parse_precision` returns them."""
    recipe = "int4" if bits["decoder"] == 4 else "int8"
    kinds = {number: kind for kind, number in KINDS.items()}
    settings = (
        f"{component}={kinds[bits[component]]}"
        for component in COMPONENTS
        if bits[component] != RECIPES[recipe][component]
    )
    return ",".join([recipe, *settings])


def component_of(name: str) -> str:
    """The component that a linear belongs to, by its name."""
    return next(part for part, prefixes in COMPONENTS.items() if name.startswith(prefixes))


def bits_per_linear(network: Llava, precision: str) -> dict[str, int]:
    """Bits of the weight of every linear that a precision quantizes, by the linear's name."""
    bits = parse_precision(precision)
    assert bits is not None, precision
    linears = (
        (name, bits[component_of(name)])
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    )
    return {name: number for name, number in linears if number}
