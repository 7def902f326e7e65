"""Losses: pure functions of a network and a batch. They return sums; the loop divides them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding, logsigmoid
from torch.utils.checkpoint import checkpoint

from ..flops import training_flops
from ..image_layout import ImageTokenLayout
from ..model import Llava, PackedAttention
from .data.packing import Batch, Pairs, positions
from .recipe import DPOConfig, KTOConfig

CHUNK = 2048  # tokens whose logits exist at once


@dataclass(frozen=True, slots=True)
class Loss:
    """A summed loss.

    count: what it is summed over (tokens or pairs, or their weights). correct: how much of that is
    right. tokens, images (crops), flops: the work that it took. extra: further sums, for the log.
    """

    total: Tensor
    count: float
    correct: float
    tokens: int = 0
    images: int = 0
    flops: float = 0.0
    extra: Mapping[str, float] = field(default_factory=dict)


def sft_loss(model: Llava, batch: Batch, attend: PackedAttention | None = None) -> Loss:
    """Cross-entropy of the tokens in `loss_mask`, each predicted from the tokens before it: the sum
    of weight times loss, and as count the sum of weights.

    attend: replaces `PackedAttention(batch.lengths)`.
    """
    spans = _spans(model, batch.pixels, _single(batch))
    hidden, tokens = _hidden(model, batch.tokens, spans, batch.lengths, attend)
    where = batch.loss_mask.nonzero()[:, 0].to(hidden.device)
    weights = None if batch.weights is None else batch.weights.to(hidden.device)
    total, correct = hidden.new_zeros((), dtype=torch.float32), 0.0
    for rows, (losses, hits) in _cross_entropy(model, hidden, tokens, where):
        if weights is not None:
            losses, hits = losses * weights[rows], hits * weights[rows]
        total, correct = total + losses.sum(), correct + float(hits.sum())
    count = len(where) if weights is None else float(weights[where].sum())
    flops = training_flops(model, batch.lengths, len(batch.pixels), len(where))
    return Loss(total, count, correct, len(tokens), len(batch.pixels), flops)


def dpo_loss(config: DPOConfig, model: Llava, batch: Pairs) -> Loss:
    """The preference loss of pairs; correct are those whose chosen answer gained more, or without a
    reference model is more likely."""
    values = logprobs(model, batch)
    if config.reference:
        values = values - batch.reference.to(values.device)
    if config.loss_type in MEANS:
        tokens = [int(mask.sum()) for mask in batch.loss_mask.split(batch.lengths)]
        values = values / torch.tensor(tokens, device=values.device).view(-1, 2)
    losses = preference_loss(values[:, 0], values[:, 1], config)
    return Loss(
        losses.sum(),
        len(losses),
        int((values[:, 0] > values[:, 1]).sum()),
        len(batch.tokens),
        len(batch.pixels),
        training_flops(model, batch.lengths, len(batch.pixels), int(batch.loss_mask.sum())),
    )


def kto_loss(config: KTOConfig, model: Llava, batch: Pairs) -> Loss:
    """KTO's loss of labelled answers; correct are those whose log-probability has moved in their
    direction, further than the KL divergence."""
    others = batch.side(1)
    with torch.no_grad():
        values, samples = token_logprobs(model, others, _single(others))
        other = values.new_zeros(len(others.lengths)).index_add(0, samples, values)
    own = batch.side(0)
    values, samples = token_logprobs(model, own, _single(own))
    chosen = values.new_zeros(len(own.lengths)).index_add(0, samples, values)
    reference = batch.reference.to(values.device)
    gained, apart = chosen - reference[:, 0], other - reference[:, 1]
    desirable = batch.desirable.to(values.device)
    losses, kl = kahneman_tversky_loss(gained, apart, desirable, config)
    return Loss(
        losses.sum(),
        len(losses),
        int(((gained > kl) == desirable).sum()),
        len(batch.tokens),
        len(batch.pixels),
        training_flops(model, own.lengths, len(own.pixels), int(own.loss_mask.sum())),
        {"kl": float(kl) * len(losses)},
    )


def _single(batch: Batch) -> list[tuple[tuple[int], ImageTokenLayout]]:
    return [((start,), layout) for start, layout in batch.media]


def kahneman_tversky_loss(
    gained: Tensor, mismatched: Tensor, desirable: Tensor, config: KTOConfig
) -> tuple[Tensor, Tensor]:
    """The loss of each answer `[P]`, and the estimate of the KL divergence.

    Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7 as TRL counts, and its estimate of z_0.
    gained: log-probabilities of answers less those under the reference model; mismatched: the same
    of other samples' answers to the same questions. desirable: `[P]`.
    """
    kl = mismatched.detach().mean().clamp(min=0)
    value = torch.sigmoid(config.beta * torch.where(desirable, gained - kl, kl - gained))
    weight = torch.where(desirable, config.desirable_weight, config.undesirable_weight)
    return weight * (1 - value), kl


MEANS = ("ipo", "simpo", "orpo")
"""Losses of the mean log-probability of an answer's tokens; the others take their sum."""


def preference_loss(chosen: Tensor, rejected: Tensor, config: DPOConfig) -> Tensor:
    """The loss of each pair `[P]`. chosen, rejected: log-probabilities of the answers, with a
    reference model the gain over it.

    DPO: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; label smoothing mixes in the loss of
    the swapped pair. IPO: Azar et al. 2023 (arXiv 2310.12036), equation 17; its authors, and TRL,
    train it on means over tokens (huggingface.co/blog/pref-tuning). SimPO: Meng et al. 2024 (arXiv
    2405.14734), equation 6. ORPO: Hong et al. 2024 (arXiv 2403.07691), equations 6 and 7, with the
    SFT loss of the chosen answer.
    """
    beta, smoothing, margin = config.beta, config.label_smoothing, chosen - rejected
    if config.loss_type == "orpo":
        return -chosen + beta * odds_ratio_loss(chosen, rejected)
    if config.loss_type.startswith("ipo"):
        return (margin - 1 / (2 * beta)).square()
    if config.loss_type == "simpo":
        margin = margin - config.gamma / beta
    return -(1 - smoothing) * logsigmoid(beta * margin) - smoothing * logsigmoid(-beta * margin)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ORPO's equation 7, of mean log-probabilities: -log sigmoid of the log of the odds ratio."""
    odds = [value - torch.log(-torch.expm1(value.clamp(max=-1e-7))) for value in (chosen, rejected)]
    return -logsigmoid(odds[0] - odds[1])


def logprobs(model: Llava, batch: Pairs) -> Tensor:
    """Log-probabilities `[P, 2]` of chosen and rejected answers; images are encoded once a pair."""
    media = [(starts, layout) for *starts, layout in batch.media]
    values, samples = token_logprobs(model, batch, media)
    return values.new_zeros(len(batch.lengths)).index_add(0, samples, values).view(-1, 2)


class Packed(Protocol):
    """Packed samples, as `Batch`."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def loss_mask(self) -> Tensor: ...
    @property
    def lengths(self) -> list[int]: ...
    @property
    def pixels(self) -> Tensor: ...


def token_logprobs(
    model: Llava,
    batch: Packed,
    media: Sequence[tuple[Sequence[int], ImageTokenLayout]],
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[L]` of the tokens with loss, float32, and the number of the sample of
    each. media: (first placeholders, layout) of each, encoded once. temperature: divides logits."""
    hidden, tokens = _hidden(model, batch.tokens, _spans(model, batch.pixels, media), batch.lengths)
    where = batch.loss_mask.nonzero()[:, 0].to(hidden.device)
    ends = torch.tensor(list(accumulate(batch.lengths)), device=hidden.device)
    found = _cross_entropy(model, hidden, tokens, where, temperature)
    return -torch.cat([losses for _, (losses, _) in found]), torch.searchsorted(
        ends, where, right=True
    )


def _spans(
    model: Llava, pixels: Tensor, media: Sequence[tuple[Sequence[int], ImageTokenLayout]]
) -> list[tuple[int, Tensor]]:
    """(First token, rows for the decoder) of all media; a blank crop without media has no rows."""
    if not len(pixels):
        return []
    crops = model.encode(pixels.to(model.lm_head.weight.device))
    if not media:
        return [(0, crops[0, :0])]
    parts = crops.split([layout.crops for _, layout in media])
    rows = [model.arrange(f, layout) for f, (_, layout) in zip(parts, media, strict=True)]
    return [(start, f) for f, (starts, _) in zip(rows, media, strict=True) for start in starts]


def _hidden(
    model: Llava,
    tokens: Tensor,
    spans: Sequence[tuple[int, Tensor]],
    lengths: Sequence[int],
    attend: PackedAttention | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states of packed samples, and their tokens on the network's device."""
    tokens = tokens.to(model.lm_head.weight.device)
    return model(
        model.embed(tokens, spans, _embedding(model)),
        positions(lengths).to(tokens.device),
        attend or PackedAttention(lengths),
    ), tokens


def _embedding(model: Llava) -> Callable[[Tensor], Tensor] | None:
    """Embeddings whose gradient is added, row by row, to that of the output head that shares the
    weight, which the backward pass computes first. Autograd alone makes a second dense matrix, at
    0.5B of 622 MB, which is zeroed and added. On a GPU that is quick, and adding rows is not
    deterministic."""
    weight = model.lm_head.weight
    tied = weight is model.language_model.embed_tokens.weight
    learns = weight.requires_grad and torch.is_grad_enabled()
    if not (tied and learns and weight.device.type == "cpu"):
        return None

    def embed(tokens: Tensor) -> Tensor:
        rows = embedding(tokens, weight.detach()).requires_grad_()

        def add(gradient: Tensor) -> None:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.index_add_(0, tokens, gradient)

        rows.register_hook(add)
        return rows

    return embed


def _cross_entropy(
    model: Llava, hidden: Tensor, tokens: Tensor, where: Tensor, temperature: float = 1.0
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Rows of `where`, a chunk at a time, with the cross-entropy of each and whether it is right.

    Logits of one chunk exist at once. Those of the last are kept for the backward pass, which
    begins with them; of the others they are computed again.
    """
    *chunks, last = where.split(CHUNK)
    for rows in chunks:
        given = (model, hidden[rows - 1], tokens[rows], temperature)
        yield rows, checkpoint(_chunk, *given, use_reentrant=False)
    yield last, _chunk(model, hidden[last - 1], tokens[last], temperature)


def _chunk(
    model: Llava, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row, and whether it is right."""
    logits = model.logits(hidden).float()
    if temperature != 1:
        logits = logits / temperature
    return cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
