"""One network over several processes: each keeps its heads and its part of every layer's inner width.

Of a layer's products the first (q, k, v; gate, up) are cut by outputs and the last (o; down) by inputs, so that the processes
tell each other one sum of `[T, D]` after each last one (Shoeybi et al. 2019, arXiv 1909.08053). The output head, a third (0.5B)
or an eleventh (7B) of what a token reads, is cut by the vocabulary; its logits are gathered. The tower is whole everywhere: cut,
it would tell 52 sums of 1.7 MB a crop to spare 0.8 GB. Crops are dealt out instead, and features gathered once. Embeddings,
norms and projector are whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import TextConfig
from ..errors import OptionError, Unsupported
from ..kernels import GROUP, PANEL
from ..model.llava import Llava
from ..model.qwen2 import Layer
from ..quantization.linear import QuantizedLinear
from .process_group import ProcessGroup


class TensorParallelGroup(threading.local):
    """The processes of a split network, and whether this thread computes with it in all of them now.

    Who computes alone would wait for the others for ever, so that is refused.
    """

    def __init__(self, ranks: ProcessGroup) -> None:
        self.ranks, self.computing = ranks, False

    @contextmanager
    def computes(self) -> Iterator[None]:
        """All processes enter it, and call the same of the network in the same order."""
        self.computing = True
        try:
            yield
        finally:
            self.computing = False

    def checked(self) -> ProcessGroup:
        if not self.computing:
            raise Unsupported(
                f"the network is spread over {self.ranks.count} processes, which compute an engine's steps together and nothing "
                "else; start one process for this"
            )
        return self.ranks


class RowParallelLinear(nn.Module):
    """A linear that has a share of the inputs, without bias: the sum of all shares."""

    def __init__(self, part: nn.Module, together: TensorParallelGroup) -> None:
        super().__init__()
        self.part, self.together = part, together

    def forward(self, x: Tensor) -> Tensor:
        ranks = self.together.checked()
        return ranks.added(self.part(x))


class ColumnParallelLinear(nn.Module):
    """A linear that has a share of the outputs: the outputs of all."""

    def __init__(self, part: nn.Module, together: TensorParallelGroup) -> None:
        super().__init__()
        self.part, self.together = part, together

    @property
    def weight(self) -> Tensor:
        """Of this process."""
        found = self.part.weight
        assert isinstance(found, Tensor)
        return found

    def forward(self, x: Tensor) -> Tensor:
        ranks = self.together.checked()
        return torch.cat(ranks.gathered(self.part(x)), -1)


class DataParallelTower(nn.Module):
    """A tower whose crops are dealt out: each process encodes its share of pixels `[N, 3, S, S]`, all get the features of all."""

    def __init__(self, tower: nn.Module, together: TensorParallelGroup) -> None:
        super().__init__()
        self.tower, self.together = tower, together

    def forward(self, pixels: Tensor) -> Tensor:
        ranks, crops = self.together.checked(), len(pixels)
        each = -(-crops // ranks.count)
        mine = (ranks.rank * each + torch.arange(each, device=pixels.device)).clamp_max(
            crops - 1
        )  # the last may be short of some
        return torch.cat(ranks.gathered(self.tower(pixels[mine])))[:crops]


def shard_model(
    network: Llava, ranks: ProcessGroup, device: torch.device, dtype: torch.dtype
) -> TensorParallelGroup:
    """Leave of a finished network, whole on the CPU or mapped, what this process computes: on its device, the floats in `dtype`.

    The config that remains is that of the share, with fewer heads and a smaller inner width: memory for keys and values that is
    made by it holds this process's. This thread then computes with it, until an engine is started. Raises OptionError, with the
    numbers, where the network cannot be shared.
    """
    together, quantised = (
        TensorParallelGroup(ranks),
        any(isinstance(module, QuantizedLinear) for module in network.modules()),
    )
    config, group = network.config, GROUP if quantised else 1
    text = share(config.text, ranks, group)
    for layer in network.language_model.layers:
        assert isinstance(layer, Layer)
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            cut(linear, ranks, 0)
        for linear in (mlp.gate_proj, mlp.up_proj):
            cut(linear, ranks, 0, group)
        attention.set_submodule(
            "o_proj", RowParallelLinear(cut(attention.o_proj, ranks, 1), together)
        )
        mlp.set_submodule(
            "down_proj", RowParallelLinear(cut(mlp.down_proj, ranks, 1, group), together)
        )
    network.set_submodule("vision_tower", DataParallelTower(network.vision_tower, together))
    for parameter in network.parameters():
        parameter.data = parameter.data.to(device, dtype)
    for buffer in network.buffers():
        buffer.data = buffer.data.to(device)
    if (
        config.text.vocab_size % (ranks.count * (PANEL if quantised else 1)) == 0
    ):  # else it is whole
        tied = network.lm_head.weight is network.language_model.embed_tokens.weight
        network.set_submodule(
            "lm_head", ColumnParallelLinear(cut(network.lm_head, ranks, 0, copy=not tied), together)
        )
    network.config = replace(config, text=text)
    network.language_model.config = text
    together.computing = True
    return together


def share(c: TextConfig, ranks: ProcessGroup, group: int) -> TextConfig:
    """The decoder that one of several processes computes; group: of how many weights its linears can be cut.

    Heads are shared evenly, the inner width as evenly as whole groups can be.
    """

    def fits(n: int) -> bool:
        heads = c.num_heads % n or c.num_kv_heads % n
        return not (
            heads
            or c.num_heads * c.head_dim % (n * group)
            or c.num_kv_heads * c.head_dim % (n * group)
        ) and (n * group <= c.intermediate_size)

    n = ranks.count
    if not fits(n):
        possible = ["1", *(str(n) for n in range(2, c.num_kv_heads + 1) if fits(n))]
        whole = f" in whole groups of {group} quantised weights" if group > 1 else ""
        raise ranks.common(
            OptionError(
                f"{n} processes cannot share {c.num_heads} heads and {c.num_kv_heads} heads of keys and values evenly "
                f"and an inner width of {c.intermediate_size}{whole}: "
                f"start torchrun with --nproc-per-node {' or '.join(possible)}"
            )
        )
    inner = local_slice(c.intermediate_size, ranks, group)
    return replace(
        c,
        num_heads=c.num_heads // n,
        num_kv_heads=c.num_kv_heads // n,
        intermediate_size=inner.stop - inner.start,
    )


def local_slice(size: int, ranks: ProcessGroup, group: int) -> slice:
    """Which of so many numbers are this process's, in whole groups."""
    first, last = (
        -(-size // group) * rank // ranks.count * group for rank in (ranks.rank, ranks.rank + 1)
    )
    return slice(first, min(size, last))


def cut(
    linear: nn.Linear | QuantizedLinear,
    ranks: ProcessGroup,
    dim: int,
    group: int | None = None,
    *,
    copy: bool = True,
) -> nn.Module:
    """Leave a linear this process's share of its outputs (`dim` 0) or inputs (1), in whole groups; None: evenly.

    copy: what remains is memory of its own, so that the rest can go.
    """
    assert dim == 0 or linear.bias is None
    size = linear.in_features if dim else linear.out_features
    mine = local_slice(size, ranks, group or size // ranks.count)
    for name, whole in [*linear.named_parameters(), *linear.named_buffers()]:
        unit = (
            1 if isinstance(whole, nn.Parameter) else GROUP if dim else PANEL
        )  # of buffers, panels of outputs, groups of inputs
        count = -(-mine.stop // unit) - mine.start // unit
        part = whole.narrow(dim, mine.start // unit, count)
        part = part.clone(memory_format=torch.contiguous_format) if copy else part
        setattr(
            linear,
            name,
            nn.Parameter(part, requires_grad=False) if isinstance(whole, nn.Parameter) else part,
        )
    if dim == 0:
        linear.out_features = mine.stop - mine.start
    else:
        linear.in_features = mine.stop - mine.start
    return linear
