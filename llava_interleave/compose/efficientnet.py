"""An EfficientNet-Lite in a PyTorch file, as efficientnet-lite-pytorch writes it, and a projector
from its classifier."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..config import EfficientNetConfig
from ..errors import CheckpointError
from ..model.efficientnet import EfficientNet
from ..processing.tokenizer import Tokenizer

SIZES = (
    (1.0, 1.0, 224), (1.0, 1.1, 240), (1.1, 1.2, 260), (1.2, 1.4, 280), (1.4, 1.8, 300),
)  # fmt: skip
"""Width, depth and image size of Lite0 to Lite4."""
_BATCH_NORM_EPS = 1e-3
_CLASS_LOGIT = 7.0
"""Logits of classes below this are near 0 after GELU: of the 1,000, a feature keeps a few."""


class EfficientNetTower:
    """The tower of a file; batch normalization is folded into the convolutions in float64."""

    def __init__(self, path: Path) -> None:
        """Raises `CheckpointError` for a file that is not one of Lite0 to Lite4."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises anything
            known = isinstance(error, (OSError, RuntimeError))
            # The others' text recommends to run the file's code.
            reason = error if known else "it holds something else"
            raise CheckpointError(f"{path} cannot be read as PyTorch weights: {reason}") from error
        try:
            self._state = {str(k): v for k, v in dict(state).items() if isinstance(v, Tensor)}
            self._tensors = self._fold()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not an EfficientNet-Lite: {error}") from error
        for width, depth, image_size in SIZES:
            channels = len(self._state["_conv_head.weight"])
            self.config = EfficientNetConfig(channels, image_size, width, depth)
            with torch.device("meta"):
                expected = EfficientNet(self.config).state_dict()
            shapes = {f"vision_tower.{name}": tuple(t.shape) for name, t in expected.items()}
            if shapes == self.shapes():
                return
        raise CheckpointError(f"the weights of {path} are of none of EfficientNet-Lite0 to Lite4")

    @property
    def classifier(self) -> tuple[Tensor, Tensor]:
        """Weight `[classes, D]` and bias `[classes]` on the mean of an image's features."""
        return self._state["_fc.weight"], self._state["_fc.bias"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def projector(self, names: Path, tokenizer: Tokenizer, embeddings: Tensor) -> dict[str, Tensor]:
        """A projector that names what the classifier sees: features -> logits of classes, GELU,
        classes -> embeddings of their names `[D]`, the mean of the tokens' at their usual norm.

        names: a JSON list with the name of each class. Raises `CheckpointError`.
        """
        weight, bias = self.classifier
        try:
            listed = json.loads(names.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read the names of classes in {names}: {error}"
            ) from error
        if not (isinstance(listed, list) and len(listed) == len(bias)):
            raise CheckpointError(f"{names} must be a JSON list of the {len(bias)} classes' names")
        embeddings = embeddings.float()
        norm = embeddings.norm(dim=-1).mean()
        means = [embeddings[tokenizer.encode(f" {name}")].mean(0) for name in listed]
        columns = torch.stack([mean * (norm / mean.norm()) for mean in means], 1)
        return {
            "multi_modal_projector.linear_1.weight": weight,
            "multi_modal_projector.linear_1.bias": bias - _CLASS_LOGIT,
            "multi_modal_projector.linear_2.weight": columns / _CLASS_LOGIT,
            "multi_modal_projector.linear_2.bias": torch.zeros(len(columns)),
        }

    def _fold(self) -> dict[str, Tensor]:
        count = 1 + max(int(key.split(".")[1]) for key in self._state if key.startswith("_blocks."))
        layers = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
        for i in range(count):
            convs = [("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2")]
            if f"_blocks.{i}._expand_conv.weight" in self._state:
                convs.append(("expand", "_expand_conv", "_bn0"))
            layers += [
                (f"blocks.{i}.{name}", f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}")
                for name, conv, norm in convs
            ]
        folded = {}
        for name, conv, norm in layers:
            scale, bias, mean, variance = (
                self._state[f"{norm}.{key}"].double()
                for key in ("weight", "bias", "running_mean", "running_var")
            )
            scale = scale / (variance + _BATCH_NORM_EPS).sqrt()
            weight = self._state[f"{conv}.weight"].double() * scale[:, None, None, None]
            folded[f"vision_tower.{name}.weight"] = weight.float()
            folded[f"vision_tower.{name}.bias"] = (bias - mean * scale).float()
        return folded
