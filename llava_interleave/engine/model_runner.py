"""Runs a scheduled step: vision encoder, decoder, sampling. Makes no scheduling decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, islice

import torch
from torch import Tensor

from ..lora import AdapterRouting
from ..model import Llava
from ..quantization.fused import FusedDecoder, FusedTower, can_fuse_decoder, can_fuse_tower
from .cuda_graphs import CudaGraphDecoder, DecodeRow, InFlightStep
from .encoder_cache import EncoderCache
from .encoder_disk_cache import EncoderDiskCache
from .kv_contiguous import ContiguousKVCache, Span, fused_sequence
from .kv_paged import PagedKVCache
from .request import EncoderInput
from .sampler import Pick, Sampler, mask_invalid_tokens
from .scheduler import ScheduledRequest, SchedulerOutput


class ModelRunner:
    """A model on one device with its KV memory.

    kv_block_size: tokens per block of a paged KV cache of `kv_bytes`; 0: contiguous.
    batch_invariant: no matrix product is shared by requests if its rounding depends on the shape.
    """

    def __init__(
        self,
        model: Llava,
        encoder_cache: EncoderCache,
        adapter_routing: AdapterRouting,
        *,
        vocab: int,
        max_batched_images: int,
        max_num_seqs: int,
        kv_bytes: int,
        kv_block_size: int,
        kv_int8: bool,
        batch_invariant: bool,
        clock: Callable[[], float],
    ) -> None:
        weight = model.language_model.norm.weight  # in the compute dtype, also if quantized
        self.model, self.encoder_cache, self.adapter_routing = model, encoder_cache, adapter_routing
        self.dtype, self.device, self.clock = weight.dtype, weight.device, clock
        where = (model.config.text, self.dtype, self.device)
        self.kv_cache: PagedKVCache | ContiguousKVCache
        self.graphs: CudaGraphDecoder | None = None
        self.fused: FusedDecoder | None = None
        if kv_block_size:
            paged = PagedKVCache(*where, kv_bytes, block_size=kv_block_size, int8=kv_int8)
            self.kv_cache = paged
            if not kv_int8 and not batch_invariant:
                self.graphs = CudaGraphDecoder(model, paged, vocab=vocab, max_num_seqs=max_num_seqs)
        else:
            self.kv_cache = ContiguousKVCache(*where, int8=kv_int8)
            if can_fuse_decoder(model.language_model):
                self.fused = FusedDecoder(model.language_model)
        self._in_flight: InFlightStep | None = None  # the last launched step, not yet returned
        tower, shape = model.vision_tower, model.config.vision
        self.tower = FusedTower(tower, shape) if can_fuse_tower(tower, shape) else None
        self.vocab, self.max_batched_images = vocab, max_batched_images
        self.batch_invariant = batch_invariant
        self.encoder_disk_cache: EncoderDiskCache | None = None
        self.crops_encoded, self.encode_seconds = 0, 0.0

    @property
    def attention(self) -> str:
        """A description of the attention backend and of CUDA graphs."""
        if isinstance(self.kv_cache, ContiguousKVCache):
            return self.kv_cache.attention
        if self.graphs is not None:
            reason = self.graphs.unavailable
        else:
            reason = (
                "batch-invariant" if self.batch_invariant else "the int8 KV cache is dequantized"
            )
        graphs = "CUDA graphs" if reason is None else f"no CUDA graphs ({reason})"
        return f"{self.kv_cache.attention}; {graphs}"

    def recover(self, error: BaseException) -> None:
        """After a step that ran out of memory, free what it had allocated."""
        if isinstance(error, torch.OutOfMemoryError):
            error.__traceback__ = None  # its frames hold tensors
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def run(self, output: SchedulerOutput) -> list[list[Pick]]:
        """Compute a step. For each request that samples: its accepted draft tokens and one more."""
        if output.encoder_inputs:
            self._encode(output)
        scheduled = output.scheduled
        for one in scheduled:
            self.kv_cache.prepare(one.kv)
            if one.source is not None:
                self.kv_cache.copy(one.source, one.kv, one.copied)
        # a step in flight has the results of the answers that go on as expected
        step, self._in_flight = self._in_flight, None
        ready = [] if step is None else [one for one in scheduled if one.kv in step.rows]
        if (
            not ready
            and self.graphs is not None
            and all(_is_plain_decode(one) for one in scheduled)
        ):
            ready = scheduled
            rows = [DecodeRow(one.kv, one.start, one.request.tokens[one.start]) for one in ready]
            step = self.graphs(rows)
        if step is None or not ready:
            return self._compute(scheduled)
        if len(ready) == len(scheduled):
            self._in_flight = self._launch_next(scheduled, step)
        others = iter(self._compute([one for one in scheduled if one.kv not in step.rows]))
        sampled = iter(self._pick(ready, step.logits, step.tokens(one.kv for one in ready)))
        picks = ((one, sampled if one.kv in step.rows else others) for one in scheduled)
        return [next(source) for one, source in picks if one.sample]

    def _launch_next(
        self, scheduled: list[ScheduledRequest], step: InFlightStep
    ) -> InFlightStep | None:
        """Launch the step after this one before its tokens are on the host, if that is possible.

        The row of an answer that turns out to have ended is ignored: it wrote behind the answer's
        last token, where nothing is read.
        """
        assert self.graphs is not None
        going_on = [one for one in scheduled if one.stop < one.request.max_kv_tokens]
        greedy = all(one.request.argmax_only and one.request.drafter is None for one in scheduled)
        full = any(one.stop == one.kv.capacity for one in going_on)
        if not going_on or not greedy or self.graphs.unavailable is not None or full:
            return None
        return self.graphs(
            [DecodeRow(one.kv, one.stop, step.rows[one.kv]) for one in going_on], step
        )

    def _compute(self, scheduled: list[ScheduledRequest]) -> list[list[Pick]]:
        """`run` without CUDA graphs, for requests whose KV memory is ready."""
        hidden: dict[int, Tensor] = {}
        fused = [one for one in scheduled if self._uses_fused(one)]
        plain = [one for one in scheduled if not self._uses_fused(one)]
        batches = [fused, *([one] for one in plain)] if self.batch_invariant else [fused, plain]
        for batch in batches:
            if any(one.start < one.stop for one in batch):
                parts = self._forward(batch).split([one.num_logits for one in batch])
                hidden |= zip(map(id, batch), parts, strict=True)
        rows = [hidden[id(one)] for one in scheduled if one.sample]
        if not rows:
            return []
        apart = self.batch_invariant and self.fused is None
        logits = torch.cat([self.model.logits(x) for x in (rows if apart else [torch.cat(rows)])])
        logits = mask_invalid_tokens(logits, self.vocab, self.model.config.placeholder_ids)
        return self._pick([one for one in scheduled if one.sample], logits)

    def _uses_fused(self, one: ScheduledRequest) -> bool:
        """Whether the fused layers compute its tokens; does not depend on the rest of the step."""
        return self.fused is not None and not one.request.adapter

    def _forward(self, batch: list[ScheduledRequest]) -> Tensor:
        """Hidden states `[num_logits, D]` of requests that all use the fused layers, or all not."""
        tokens = [
            token
            for one in batch
            for token in (*islice(one.request.tokens, one.start, one.stop), *one.draft_tokens)
        ]
        positions = torch.tensor(
            [position for one in batch for position in range(one.start, one.stop)],
            device=self.device,
        )
        x = self.model.embed(torch.tensor(tokens, device=self.device), self._feature_spans(batch))
        computed = [one for one in batch if one.start < one.stop]
        spans = [Span(one.kv, one.start, one.stop) for one in computed]
        if self.fused is not None and self._uses_fused(batch[0]):
            sequences = zip(spans, computed, strict=True)
            return self.fused(
                x, positions, [fused_sequence(span, one.num_logits) for span, one in sequences]
            )
        with self.adapter_routing.through(_adapter_spans(batch)):
            hidden = self.model.forward(x, positions, self.kv_cache.attend(spans))
        parts = hidden.split([one.stop - one.start for one in computed])
        pairs = zip(parts, computed, strict=True)
        return torch.cat([part[len(part) - one.num_logits :] for part, one in pairs])

    def _pick(
        self, scheduled: list[ScheduledRequest], logits: Tensor, best: Sequence[int] = ()
    ) -> list[list[Pick]]:
        """Sample at each row of the logits, up to the first rejected draft token.

        best: the argmax of each row, if it is known.
        """
        if not best and any(one.request.argmax_only for one in scheduled):
            best = logits.argmax(-1).tolist()
        picks: list[list[Pick]] = []
        start = 0
        for one in scheduled:
            picks.append([])
            for row, draft_token in enumerate((*one.draft_tokens, None), start):
                greedy = one.request.argmax_only
                pick = Pick(best[row]) if greedy else self._sampler(one).pick(logits[row])
                picks[-1].append(pick)
                if pick.token != draft_token:
                    break
            start += len(one.draft_tokens) + 1
        return picks

    def _sampler(self, one: ScheduledRequest) -> Sampler:
        request = one.request
        if request.sampler is None:
            prompt, constraint = request.prompt.tokens, request.constraint
            request.sampler = Sampler(request.sampling, prompt, self.vocab, self.device, constraint)
        return request.sampler

    def _encode(self, output: SchedulerOutput) -> None:
        """Encode the step's images, crops of several requests together, into the cache."""
        began = self.clock()
        inputs = [one for one in output.encoder_inputs.values() if not self._from_disk(one)]
        inputs.sort(key=lambda one: one.adapter)
        max_crops = 0 if self.batch_invariant else self.max_batched_images
        while inputs:
            batch: list[EncoderInput] = []
            crops, adapter = 0, inputs[0].adapter
            while (
                inputs
                and inputs[0].adapter == adapter
                and (not batch or crops + inputs[0].layout.crops <= max_crops)
            ):
                crops += inputs[0].layout.crops
                batch.append(inputs.pop(0))
            self.crops_encoded += crops
            pixels = torch.cat([one.pixels for one in batch]).to(self.device, self.dtype)
            parts = pixels.split(self.max_batched_images)
            with self.adapter_routing.through([(adapter, slice(None))] if adapter else ()):
                features = torch.cat([self._encode_images(part, adapter) for part in parts])
            rows = features.split([one.layout.crops for one in batch])
            for one, crop_features in zip(batch, rows, strict=True):
                arranged = self.model.arrange(crop_features, one.layout)
                # a view would keep the features of the whole batch in memory
                self.encoder_cache.put(one.key, arranged.clone() if len(batch) > 1 else arranged)
                if self.encoder_disk_cache is not None and not one.private:
                    self.encoder_disk_cache.put(one.key, arranged)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that the clock includes the computation
        seconds = self.clock() - began
        self.encode_seconds += seconds
        for scheduled in output.scheduled:
            if scheduled.needs_encoder:
                scheduled.request.encode_seconds += seconds

    def _from_disk(self, one: EncoderInput) -> bool:
        """Whether the features of an input were on disk; they are in the cache then."""
        if self.encoder_disk_cache is None or one.private:
            return False
        features = self.encoder_disk_cache.get(one.key)
        if features is None or len(features) != one.stop - one.start:
            return False
        self.encoder_cache.put(one.key, features)
        return True

    def _encode_images(self, pixels: Tensor, adapter: str) -> Tensor:
        """Crops `[N, 3, S, S]` -> projected features `[N, grid * grid, D]`."""
        if self.tower is None or adapter:
            return self.model.encode(pixels)
        features: Tensor = self.model.multi_modal_projector(self.tower(pixels))
        return features

    def _feature_spans(self, batch: list[ScheduledRequest]) -> list[tuple[int, Tensor]]:
        """Image features of the flat batch, and the row at which each begins."""
        spans, offset = [], 0
        for one in batch:
            request = one.request
            for image in islice(request.encoder_inputs, request.first_input, request.held_input):
                start, stop = max(one.start, image.start), min(one.stop, image.stop)
                features = self.encoder_cache[image.key][start - image.start : stop - image.start]
                spans.append((offset + start - one.start, features))
            offset += one.stop - one.start
        return spans


def _is_plain_decode(one: ScheduledRequest) -> bool:
    """Whether it computes only the next token of an answer, without an adapter."""
    request = one.request
    single = one.sample and one.stop - one.start == 1
    return single and request.first_input == request.held_input and not request.adapter


def _adapter_spans(batch: list[ScheduledRequest]) -> list[tuple[str, slice]]:
    """Rows of the flat batch by adapter."""
    spans, stop = [], 0
    for adapter, group in groupby(batch, key=lambda one: one.request.adapter):
        start, stop = stop, stop + sum(one.stop - one.start for one in group)
        if adapter and start < stop:
            spans.append((adapter, slice(start, stop)))
    return spans
