"""Shapes of vision tower, decoder, whole network and adapter. Knows no torch and no files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from .errors import OptionError
from .image_layout import INTERLEAVE, Arrangement, ImageTokenLayout, max_tokens_per_image


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The SigLIP tower. `num_layers` counts the layers whose output is used (26 of so400m's 27)."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 26
    num_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    spare_layers: int = field(default=0, compare=False)
    """Layers of a checkpoint after the used ones; they are not loaded."""

    @property
    def grid(self) -> int:
        """Features per side: 384 // 14 = 27."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True)
class EfficientNetConfig:
    """An EfficientNet-Lite tower: a convolutional network whose feature map becomes few features.

    The defaults are Lite2's. hidden_size: channels of the last convolution. width, depth: the
    coefficients that scale channels and repeats of the stages. Features of the map (a side for
    every 32 pixels) are averaged over windows of `pool_size` x `pool_size`, `pool_stride` apart.

    Source: efficientnet/lite/efficientnet_lite_builder.py of github.com/tensorflow/tpu.
    """

    hidden_size: int = 1280
    image_size: int = 260
    width: float = 1.1
    depth: float = 1.2
    pool_size: int = 5
    pool_stride: int = 2

    @property
    def grid(self) -> int:
        """Features per side: (9 - 5) // 2 + 1 = 3."""
        return (-(-self.image_size // 32) - self.pool_size) // self.pool_stride + 1

    @property
    def patch_size(self) -> int:
        """Pixels per feature, rounded down."""
        return self.image_size // self.grid

    @property
    def blocks(self) -> tuple[InvertedBottleneck, ...]:
        """All blocks. First and last stage are not repeated more often, and the stem, of 32
        channels, and the head are not wider in larger networks."""
        blocks, inputs = [], STEM
        for number, (repeats, kernel, stride, expansion, channels) in enumerate(_STAGES):
            outputs = max(8, int(channels * self.width + 4) // 8 * 8)
            outputs += 8 * (outputs < 0.9 * channels * self.width)
            if 0 < number < len(_STAGES) - 1:
                repeats = math.ceil(repeats * self.depth)
            for i in range(repeats):
                step = stride if i == 0 else 1
                blocks.append(InvertedBottleneck(inputs, outputs, kernel, step, expansion))
                inputs = outputs
        return tuple(blocks)

    @property
    def convolutions(self) -> tuple[tuple[int, int], ...]:
        """(Weights, side of the feature map that they make) of each convolution, in order."""
        side = -(-self.image_size // 2)
        found = [(27 * STEM, side)]
        for block in self.blocks:
            inner = block.inputs * block.expansion
            if block.expansion > 1:
                found.append((block.inputs * inner, side))
            side = -(-side // block.stride)
            found += [(inner * block.kernel**2, side), (inner * block.outputs, side)]
        return (*found, (self.blocks[-1].outputs * self.hidden_size, side))


STEM = 32
"""Channels of EfficientNet's first convolution."""
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
"""Repeats, kernel, stride, expansion, channels. Source: Tan and Le 2019 (arXiv 1905.11946)."""


@dataclass(frozen=True, slots=True)
class InvertedBottleneck:
    """A block of EfficientNet: channels in and out, side of its kernel, stride, expansion."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    expansion: int


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The decoder, of Qwen2's or Llama's shape. The defaults are those of transformers'
    `Qwen2Config`, which the 7B file relies on.
    """

    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    vocab_size: int = 151936
    context: int = 32768
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    """Whether q, k and v have biases: Qwen2 has them, Llama has not."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The low-rank matrices of an adapter (LoRA); the defaults are LLaVA-NeXT's training code's."""

    rank: int = field(default=64, metadata={"help": "Rank of the matrices."})
    alpha: float = field(
        default=16.0, metadata={"help": "Their product is scaled by alpha / rank."}
    )
    dropout: float = field(
        default=0.05, metadata={"help": "Fraction of their inputs left out while training."}
    )
    targets: tuple[str, ...] = field(
        default=("language_model.*",),
        metadata={
            "help": "Name patterns of the linears that get them, such as language_model.* or "
            "*.q_proj; several times."
        },
    )
    rslora: bool = field(
        default=False,
        metadata={"help": "Scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)."},
    )
    dora: bool = field(
        default=False,
        metadata={
            "help": "Also train the magnitude of each output (DoRA, Liu et al. 2024, arXiv "
            "2402.09353)."
        },
    )
    rank_pattern: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Other ranks by name pattern, such as vision_tower.*=8; the first that matches "
            "counts; several times."
        },
    )
    alpha_pattern: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Other alphas, in the same form, such as vision_tower.*=32."},
    )
    modules_to_save: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Name patterns of modules that are trained whole, next to the matrices, and "
            "stored with them, such as multi_modal_projector; several times."
        },
    )

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise OptionError(
                f"the rank of an adapter is a whole number from 1 on, not {self.rank!r}"
            )
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise OptionError(f"an adapter's alpha is a number above 0, not {self.alpha!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise OptionError(f"dropout is a fraction from 0 to below 1, not {self.dropout!r}")
        for name in ("targets", "rank_pattern", "alpha_pattern", "modules_to_save"):
            values = getattr(self, name)
            needed = values or name != "targets"
            if not (isinstance(values, tuple) and needed and all(map(_is_text, values))):
                raise OptionError(f"{name} must be a list of texts, not {values!r}")
        for name in ("rslora", "dora"):
            if type(getattr(self, name)) is not bool:
                raise OptionError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern, value in _by_pattern(name, getattr(self, name)):
                one: dict[str, Any] = {"alpha": value}
                if name == "rank_pattern":
                    one = {"rank": int(value) if value.is_integer() else value}
                try:
                    replace(self, rank_pattern=(), alpha_pattern=(), **one)
                except OptionError as error:
                    raise OptionError(f"{name} {pattern}: {error}") from None

    def scale(self, rank: int) -> float:
        """The factor on a product of this rank."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def rank_of(self, linear: str) -> int:
        """The rank of a linear's matrices, by its name."""
        return int(_first(_by_pattern("rank_pattern", self.rank_pattern), linear, self.rank))

    def alpha_of(self, linear: str) -> float:
        """The alpha of a linear's matrices, by its name."""
        return _first(_by_pattern("alpha_pattern", self.alpha_pattern), linear, self.alpha)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The name patterns of linears: those of `targets`, `rank_pattern`, `alpha_pattern`."""
        return (
            *self.targets,
            *(text.rpartition("=")[0] for text in (*self.rank_pattern, *self.alpha_pattern)),
        )


def _by_pattern(name: str, texts: tuple[str, ...]) -> list[tuple[str, float]]:
    """The patterns and numbers of PATTERN=NUMBER. Raises OptionError."""
    found = []
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            found.append((pattern, float(number)))
        except ValueError:
            found.append(("", 0.0))
        if not found[-1][0]:
            raise OptionError(f"{name} takes PATTERN=NUMBER, such as vision_tower.*=8: {text!r}")
    return found


def _first(patterns: list[tuple[str, float]], name: str, default: float) -> float:
    return next((value for pattern, value in patterns if fnmatchcase(name, pattern)), default)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


@dataclass(frozen=True, slots=True)
class LlavaConfig:
    """The whole network: tower, two-layer GELU projector, decoder."""

    vision: VisionConfig | EfficientNetConfig
    text: TextConfig
    image_token_id: int = 151646
    arrangement: Arrangement = INTERLEAVE
    video_token_id: int | None = None
    """The id of `<video>`, which OneVision has in transformers' form; elsewhere a video's
    placeholders are `<image>` too.
    """
    projector_size: int | None = None
    """Width between the projector's layers; None: as the decoder."""

    @property
    def projector_hidden_size(self) -> int:
        return self.projector_size or self.text.hidden_size

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Ids that stand for features and are never generated."""
        video = self.video_token_id
        return (self.image_token_id,) if video is None else (self.image_token_id, video)

    def placeholder_id(self, video: bool) -> int:
        """The id of the placeholders of an image or a video."""
        other = self.video_token_id if video else None
        return self.image_token_id if other is None else other

    @property
    def image_layout(self) -> ImageTokenLayout:
        """Of an image that is not tiled."""
        newline = self.arrangement.newline
        return ImageTokenLayout(self.vision.grid, newline="end" if newline else "none")

    def video_layout(self, frames: int) -> ImageTokenLayout:
        """Of a video of so many frames."""
        pool, newline = self.arrangement.video_pool, self.arrangement.video_newline
        return ImageTokenLayout(self.vision.grid, frames, bilinear=pool, newline=newline)

    @property
    def max_tokens_per_image(self) -> int:
        """Of an image that is tiled by default, over all shapes; else of `image_layout`."""
        vision = self.vision
        return max_tokens_per_image(vision.image_size, vision.grid, self.arrangement)

    @property
    def num_parameters(self) -> int:
        """Parameters of the network; a tied output head counts once."""
        v, t = self.vision, self.text
        width, hidden = v.hidden_size, self.projector_hidden_size
        if isinstance(v, EfficientNetConfig):
            biases = STEM + width + sum(b.outputs for b in v.blocks)
            biases += sum(b.inputs * b.expansion * (1 + (b.expansion > 1)) for b in v.blocks)
            tower = biases + sum(weights for weights, _ in v.convolutions)
        else:
            inner = v.intermediate_size
            layer = 4 * (width + 1) * width + 2 * inner * width + inner + 5 * width
            tower = (3 * v.patch_size**2 + 1 + v.grid**2) * width + v.num_layers * layer
        projector = (width + 1) * hidden + (hidden + 1) * t.hidden_size
        q, kv = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
        layer = t.hidden_size * (2 * q + 2 * kv + 3 * t.intermediate_size + 2)
        layer += (q + 2 * kv) * t.attention_bias
        embeddings = t.vocab_size * (1 if t.tie_word_embeddings else 2)
        decoder = t.num_layers * layer + (embeddings + 1) * t.hidden_size
        newline = t.hidden_size if self.arrangement.newline else 0
        return tower + projector + newline + decoder
