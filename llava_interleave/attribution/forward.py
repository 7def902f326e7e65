"""Log-probabilities of an answer where some of its images are hidden, by few forward passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..model import ContinuationAttention, Llava, StoredKV
from ..prompt import Media, Prompt

CROPS_PER_CALL, ROWS_PER_CALL = 8, 64
"""Crops per call of the vision tower; rows whose logits are in memory at a time."""
PASS_TOKENS = 1024
"""Tokens of several passes that are computed together, if a single one is not longer."""


class CachedPrompt(Protocol):
    """What an engine has computed of a prompt (`engine.CachedPrompt`).

    length: tokens whose KV cache is in `stored`. features: of each media `[length, D]`, or
    None where they are not cached.
    """

    @property
    def length(self) -> int: ...
    @property
    def stored(self) -> StoredKV: ...
    @property
    def features(self) -> Sequence[Tensor | None]: ...


class ForwardPass(NamedTuple):
    """Rows computed again: their positions, and the stored tokens that all see, as ranges."""

    rows: Tensor
    seen: Sequence[tuple[int, int]]


class AttributionRun:
    """Forward passes over a prompt with its answer.

    The row before an answer's token predicts it, so the answer's last token is not an input and the
    answer's rows are the last `len(answer)` ones. The KV cache up to the end of the last
    image is computed once, or taken from `cached`.

    check_cancelled: called before each pass; it may raise.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Llava,
        prompt: Prompt,
        answer: Sequence[int],
        vocab: int,
        check_cancelled: Callable[[], None] = lambda: None,
        cached: CachedPrompt | None = None,
    ) -> None:
        check_cancelled()
        self.device = model.language_model.norm.weight.device
        self.model, self.prompt, self.vocab = model, prompt, vocab
        self.check_cancelled = check_cancelled
        self.answer = torch.tensor(list(answer), device=self.device)
        self.tokens = torch.tensor([*prompt.tokens, *answer[:-1]], device=self.device)
        self.suffix = max(media.start + media.layout.length for media in prompt.media)
        """The first row after all images."""
        self.is_media = torch.zeros(len(self.tokens), dtype=torch.bool)
        for media in prompt.media:
            self.is_media[media.start : media.start + media.layout.length] = True
        self.features = [None] * len(prompt.media) if cached is None else list(cached.features)
        use = cached is not None and cached.length >= self.suffix
        self.stored: StoredKV | None = cached.stored if cached is not None and use else None
        self._inputs: Tensor | None = None

    @torch.inference_mode()
    def with_attention(self, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[A]`; the answer's attention `[A, T]`, mean over layers and heads."""
        first = 0 if self.stored is None else self.suffix
        whole = ForwardPass(torch.arange(first, len(self.tokens)), [(0, first)] if first else [])
        (logprobs,), recorded = self._forward([whole], layers)
        return logprobs, torch.stack([recorded[layer] for layer in layers]).mean(0)

    @torch.inference_mode()
    def without(self, media: Sequence[Media]) -> Tensor:
        """Log-probabilities `[A]` where nothing sees these media; all positions stay.

        Under causal attention that is the same as removing their rows. All rows behind the first of
        them are computed again.
        """
        self._fill_kv_cache()
        first = min(one.start for one in media)
        hidden = torch.zeros_like(self.is_media)
        for one in media:
            hidden[one.start : one.start + one.layout.length] = True
        rows = torch.arange(first, len(self.tokens))
        (logprobs,), _ = self._forward(
            [ForwardPass(rows[~hidden[first:]], [(0, first)] if first else [])]
        )
        return logprobs

    @torch.inference_mode()
    def directly_without(self, hidden: Sequence[Collection[Media]]) -> list[Tensor]:
        """For each collection of media, log-probabilities `[A]` where no row behind the last media
        sees them.

        Only these rows are computed again: what other media or texts took from a hidden one stays.
        For the last media it is `without`; of none, those with all images.
        """
        self._fill_kv_cache()
        rows = torch.arange(self.suffix, len(self.tokens))
        passes = [ForwardPass(rows, visible_ranges(self.suffix, media)) for media in hidden]
        count = max(1, PASS_TOKENS // len(rows))
        calls = [passes[i : i + count] for i in range(0, len(passes), count)]
        return [logprobs for call in calls for logprobs in self._forward(call)[0]]

    def _fill_kv_cache(self) -> None:
        if self.stored is None:
            self.with_attention([0])

    def _forward(
        self, passes: Sequence[ForwardPass], layers: Sequence[int] = ()
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Log-probabilities `[A]` of each pass; the attention of the first one in `layers`.

        As in the engine, over the tokens that can be generated. A pass over everything fills the
        KV cache.
        """
        self.check_cancelled()
        count = len(self.answer)
        lengths = [len(one.rows) for one in passes]
        seen = [one.seen for one in passes]
        attend = ContinuationAttention(lengths, seen, self.stored, layers=layers, record=count)
        rows = torch.cat([one.rows for one in passes])
        x, positions = self._embed(rows), rows.to(self.device)
        if self.stored is None:
            computed: list[tuple[Tensor, Tensor]] = []

            def storing(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                computed.append((k[: self.suffix].clone(), v[: self.suffix].clone()))
                return attend(layer, q, k, v)

            hidden = self.model.forward(x, positions, storing)
            self.stored = computed.__getitem__
        else:
            hidden = self.model.forward(x, positions, attend)
        ends = hidden.split(lengths)
        return [self._answer_logprobs(part[-count:]) for part in ends], attend.recorded

    def _answer_logprobs(self, hidden: Tensor) -> Tensor:
        """Log-probability of each token of the answer `[A]` from the rows before them `[A, D]`."""
        logprobs = []
        calls = zip(hidden.split(ROWS_PER_CALL), self.answer.split(ROWS_PER_CALL), strict=True)
        for rows, tokens in calls:
            logits = self.model.logits(rows)[:, : self.vocab].float()
            for placeholder in self.model.config.placeholder_ids:
                logits[:, placeholder : placeholder + 1] = -torch.inf
            logprobs.append(logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
        return torch.cat(logprobs)

    def _embed(self, rows: Tensor) -> Tensor:
        """Inputs of some rows `[R, D]`; images are encoded only if the rows have some."""
        if not self.is_media[rows].any():
            return self.model.embed(self.tokens[rows.to(self.device)])
        if self._inputs is None:
            spans = [
                (media.start, self._encode(media) if known is None else known)
                for media, known in zip(self.prompt.media, self.features, strict=True)
            ]
            self._inputs = self.model.embed(self.tokens, spans)
        return self._inputs[rows.to(self.device)]

    def _encode(self, media: Media) -> Tensor:
        weight = self.model.language_model.norm.weight
        starts = range(0, media.layout.crops, CROPS_PER_CALL)
        parts = (media.pixels_of(start, start + CROPS_PER_CALL) for start in starts)
        features = torch.cat(
            [self.model.encode(part.to(weight.device, weight.dtype)) for part in parts]
        )
        return self.model.arrange(features, media.layout)


def visible_ranges(stop: int, hidden: Collection[Media]) -> list[tuple[int, int]]:
    """The tokens before `stop` that are of no hidden media, as ranges."""
    spans = sorted((media.start, media.start + media.layout.length) for media in hidden)
    edges = [0, *(edge for span in spans for edge in span), stop]
    return [(start, end) for start, end in list(pairwise(edges))[::2] if start < end]
