"""Runs a planned step through the network: tower, decoder, sampling. Decides nothing that a plan or an answer depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, islice

import torch
from torch import Tensor

from ..lora import AdapterRouting
from ..model import Llava, arrange_features
from ..quantization.fused import FusedDecoder, FusedTower, can_fuse_decoder, can_fuse_tower
from .cuda_graphs import CudaGraphDecoder, DecodeRow, InFlightStep
from .kv_contiguous import ContiguousKVCache, Span, fusible
from .kv_paged import PagedKVCache
from .prefix_cache import EncoderCache
from .request import EncoderInput
from .sampler import Pick, Sampler, mask_invalid_tokens
from .scheduler import ScheduledRequest, SchedulerOutput


class Runner:
    """One network on one device with its KV memory. alone: nothing shares a product that would round by how much shares it.

    kv_block: tokens of a block of KV memory, which is a pool of `kv_bytes` then; 0: it is a slab a sequence.
    """

    def __init__(
        self,
        model: Llava,
        features: EncoderCache,
        route: AdapterRouting,
        *,
        vocab: int,
        max_batched_images: int,
        max_num_seqs: int,
        kv_bytes: int,
        kv_block: int,
        kv_in_eight_bits: bool,
        alone: bool,
        clock: Callable[[], float],
    ) -> None:
        weight = (
            model.language_model.norm.weight
        )  # of the type computed in, also when the linears are quantized
        self.model, self.features, self.route, self.clock = model, features, route, clock
        self.dtype, self.device = weight.dtype, weight.device
        place = (model.config.text, self.dtype, self.device)
        pool = (
            PagedKVCache(*place, kv_bytes, block=kv_block, in_eight_bits=kv_in_eight_bits)
            if kv_block
            else None
        )
        self.memory = pool or ContiguousKVCache(*place, in_eight_bits=kv_in_eight_bits)
        fixed = pool is not None and not kv_in_eight_bits and not alone
        self.captured = (
            CudaGraphDecoder(model, pool, vocab=vocab, most=max_num_seqs)
            if pool and fixed
            else None
        )
        self._ahead: InFlightStep | None = None  # launched last, and not asked for yet
        self.fused = (
            FusedDecoder(model.language_model)
            if not kv_block and can_fuse_decoder(model.language_model)
            else None
        )
        tower, shape = model.vision_tower, model.config.vision
        self.tower = FusedTower(tower, shape) if can_fuse_tower(tower, shape) else None
        self.vocab, self.max_batched_images, self.alone = vocab, max_batched_images, alone
        self.crops_encoded, self.encoding = 0, 0.0  # and the seconds that it took

    @property
    def attention(self) -> str:
        """What computes attention and how answers are decoded, in words."""
        alone = (
            "each answer is computed alone"
            if self.alone
            else "keys and values in 8 bits are unpacked"
        )
        reason = self.captured.why_not if self.captured else alone
        graphs = "CUDA graphs" if reason is None else f"no CUDA graphs ({reason})"
        return (
            f"{self.memory.attention}; {graphs}"
            if isinstance(self.memory, PagedKVCache)
            else self.memory.attention
        )

    def recover(self, error: BaseException) -> None:
        """After a step for which there was no memory, give back all that it had."""
        if isinstance(error, torch.OutOfMemoryError):
            error.__traceback__ = None  # whose frames hold it
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def run(self, plan: SchedulerOutput) -> list[list[Pick]]:
        """Compute a step; the tokens chosen for each work that samples: as long as its guesses are right, and one more."""
        if plan.encode:
            self._encode(plan)
        work = plan.work
        for w in work:
            self.memory.prepare(w.kv)
            if w.source is not None:
                self.memory.copy(w.source, w.kv, w.copied)
        step, self._ahead = self._ahead, None  # of which answers went on as they were expected to
        known = [] if step is None else [w for w in work if w.kv in step.rows]
        if not known and self.captured is not None and all(_plain(w) for w in work):
            known, step = (
                work,
                self.captured([DecodeRow(w.kv, w.start, w.request.tokens[w.start]) for w in work]),
            )
        if step is None or not known:
            return self._compute(work)
        if len(known) == len(work):
            self._ahead = self._next(work, step)
        others = iter(self._compute([w for w in work if w.kv not in step.rows]))
        chosen = iter(self._pick(known, step.logits, step.tokens(w.kv for w in known)))
        return [next(chosen if w.kv in step.rows else others) for w in work if w.sample]

    def _next(self, work: list[ScheduledRequest], step: InFlightStep) -> InFlightStep | None:
        """Launch the step after this one, before the host knows what this one chose; None where it takes more than that to go on.

        An answer that turns out to have ended has a row too many there: nobody asks for it, and what it wrote lies behind the
        answer's last token, where nobody reads.
        """
        assert self.captured is not None
        on = [w for w in work if w.stop < w.request.most]  # the others end now
        plain = all(w.request.plain and w.request.lookup is None for w in work)
        if (
            not on
            or not plain
            or self.captured.why_not is not None
            or any(w.stop == w.kv.capacity for w in on)
        ):
            return None
        return self.captured([DecodeRow(w.kv, w.stop, step.rows[w.kv]) for w in on], step)

    def _compute(self, work: list[ScheduledRequest]) -> list[list[Pick]]:
        """`run`, of works whose memory is ready, launch by launch."""
        hidden: dict[int, Tensor] = {}
        quick, others = [w for w in work if self._quick(w)], [w for w in work if not self._quick(w)]
        for together in (quick, *([w] for w in others)) if self.alone else (quick, others):
            if any(w.start < w.stop for w in together):
                parts = self._forward(together).split([w.asked for w in together])
                hidden |= zip(map(id, together), parts, strict=True)
        last = [hidden[id(w)] for w in work if w.sample]
        if not last:
            return []
        several = last if self.alone and self.fused is None else [torch.cat(last)]
        logits = torch.cat([self.model.logits(rows) for rows in several])
        logits = mask_invalid_tokens(logits, self.vocab, self.model.config.image_token_id)
        return self._pick([w for w in work if w.sample], logits)

    def _quick(self, w: ScheduledRequest) -> bool:
        """Whether its tokens go through the fused layers, whatever else is in the step."""
        return self.fused is not None and not w.request.adapter

    def _forward(self, work: list[ScheduledRequest]) -> Tensor:
        """Hidden states of the tokens asked for; of works that are all quick or all not."""
        tokens = [
            token
            for w in work
            for token in (*islice(w.request.tokens, w.start, w.stop), *w.guesses)
        ]
        positions = torch.tensor(
            [position for w in work for position in range(w.start, w.stop)], device=self.device
        )
        x = self.model.embed(torch.tensor(tokens, device=self.device), self._spans(work))
        computed = [w for w in work if w.start < w.stop]
        spans = [Span(w.kv, w.start, w.stop) for w in computed]
        if self.fused is not None and self._quick(work[0]):
            return self.fused(
                x,
                positions,
                [fusible(span, w.asked) for span, w in zip(spans, computed, strict=True)],
            )
        with self.route.through(_routes(work)):
            hidden = self.model.forward(x, positions, self.memory.attend(spans))
        parts = hidden.split([w.stop - w.start for w in computed])
        return torch.cat(
            [part[len(part) - w.asked :] for part, w in zip(parts, computed, strict=True)]
        )

    def _pick(
        self, work: list[ScheduledRequest], logits: Tensor, best: Sequence[int] = ()
    ) -> list[list[Pick]]:
        """best: the likeliest token of each row of the logits, where that is known."""
        if not best and any(w.request.plain for w in work):
            best = logits.argmax(-1).tolist()
        found, start = [], 0
        for w in work:
            picks: list[Pick] = []
            for row, guess in enumerate((*w.guesses, None), start):
                picks.append(
                    Pick(best[row]) if w.request.plain else self._sampler(w).pick(logits[row])
                )
                if picks[-1].token != guess:
                    break
            found.append(picks)
            start += len(w.guesses) + 1
        return found

    def _sampler(self, w: ScheduledRequest) -> Sampler:
        request = w.request
        if request.sampler is None:
            request.sampler = Sampler(
                request.sampling, request.prompt.tokens, self.vocab, self.device, request.constraint
            )
        return request.sampler

    def _encode(self, plan: SchedulerOutput) -> None:
        """Encode the step's units, crops of several requests together, and put them into the cache."""
        began = self.clock()
        units = sorted(plan.encode.values(), key=lambda unit: unit.adapter)
        while units:
            batch: list[EncoderInput] = []
            crops = 0
            adapter = units[0].adapter
            most = 0 if self.alone else self.max_batched_images
            while (
                units
                and units[0].adapter == adapter
                and (not batch or crops + len(units[0].pixels) <= most)
            ):
                crops += len(units[0].pixels)
                batch.append(units.pop(0))
            self.crops_encoded += crops
            pixels = torch.cat([unit.pixels for unit in batch]).to(self.device, self.dtype)
            with self.route.through([(adapter, slice(None))] if adapter else ()):
                encoded = torch.cat(
                    [self._see(part, adapter) for part in pixels.split(self.max_batched_images)]
                )
            for unit, rows in zip(
                batch, encoded.split([len(unit.pixels) for unit in batch]), strict=True
            ):
                arranged = arrange_features(rows, unit.layout)
                self.features.put(
                    unit.key, arranged.clone() if len(batch) > 1 else arranged
                )  # not a view of the whole batch
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or the clock would stop before the tower has
        took = self.clock() - began
        self.encoding += took
        for w in plan.work:
            if w.encodes:
                w.request.vision += took

    def _see(self, pixels: Tensor, adapter: str) -> Tensor:
        """Crops `[N, 3, S, S]` -> projected features `[N, grid * grid, D]`."""
        if self.tower is None or adapter:
            return self.model.encode(pixels)
        features: Tensor = self.model.multi_modal_projector(self.tower(pixels))
        return features

    def _spans(self, work: list[ScheduledRequest]) -> list[tuple[int, Tensor]]:
        """Which rows of the flat batch are features."""
        spans, offset = [], 0
        for w in work:
            for unit in islice(w.request.units, w.request.first_unit, w.request.held_unit):
                a, b = max(w.start, unit.start), min(w.stop, unit.stop)
                spans.append(
                    (offset + a - w.start, self.features[unit.key][a - unit.start : b - unit.start])
                )
            offset += w.stop - w.start
        return spans


def _plain(w: ScheduledRequest) -> bool:
    """Whether all that it computes is the next token of an answer, by the network alone."""
    return (
        w.sample
        and w.stop - w.start == 1
        and w.request.first_unit == w.request.held_unit
        and not w.request.adapter
    )


def _routes(work: list[ScheduledRequest]) -> list[tuple[str, slice]]:
    """Which rows of the flat batch go through which adapter."""
    spans, stop = [], 0
    for adapter, group in groupby(work, key=lambda w: w.request.adapter):
        start, stop = stop, stop + sum(w.stop - w.start for w in group)
        if adapter and start < stop:
            spans.append((adapter, slice(start, stop)))
    return spans
