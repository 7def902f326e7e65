"""Runs a scheduled step: vision encoder, decoder, sampling. Makes no scheduling decision."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from ..config import VisionConfig
from ..kernels import triton
from ..lora import AdapterRouting
from ..model import Llava
from ..model.efficientnet import EfficientNet
from ..model.siglip import SigLIP
from ..options import SamplingParams
from ..prompt import Prompt
from ..quantization.fused import FusedDecoder, FusedTower, can_fuse_decoder, can_fuse_tower
from .cuda_graphs import CudaGraphDecoder, CudaGraphTower, DecodeRow, InFlightStep
from .device_stream import stream_of
from .encoder_cache import EncoderCache, Key
from .encoder_disk_cache import EncoderDiskCache
from .gpu_layers import GpuDecoder, GpuTower
from .gpu_sampler import GpuSampler, mark_not_finite
from .kv_contiguous import ContiguousKVCache, Span, fused_sequence
from .kv_paged import PagedBatch, PagedKVCache
from .prefix_cache import CacheKey, SequenceKV
from .request import EncoderInput, Request
from .sampler import Pick, Sampler, mask_invalid_tokens
from .scheduler import ScheduledRequest, SchedulerOutput

SMALL_PARAMETERS = 100_000_000
"""A network of at most so many is fast on any path, and runs in float32, which no kernel has."""


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
        self.stream = stream_of(self.device)
        self.kv_cache: PagedKVCache | ContiguousKVCache
        self.fused: FusedDecoder | None = None
        self.gpu_decoder: GpuDecoder | None = None
        self.gpu_sampler: GpuSampler | None = None
        self.graphs: CudaGraphDecoder | None = None
        self.tower_graphs: CudaGraphTower | None = None
        if kv_block_size:
            self.kv_cache = PagedKVCache(*where, kv_bytes, block_size=kv_block_size, int8=kv_int8)
            large = model.config.num_parameters > SMALL_PARAMETERS
            if large and self.device.type == "cuda" and self.kv_cache.no_kernels is not None:
                warnings.warn(
                    f"no Triton kernels ({self.kv_cache.no_kernels}): attention runs sequence by "
                    "sequence, many times slower",
                    stacklevel=2,
                )
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
        self._encoding: tuple[Any, Any] | None = None  # events around this step's encoding
        if isinstance(self.kv_cache, PagedKVCache) and self.kv_cache.no_kernels is None:
            with self.stream.active(), torch.inference_mode():
                self._prepare_gpu(self.kv_cache, max_num_seqs)

    def _prepare_gpu(self, cache: PagedKVCache, max_num_seqs: int) -> None:
        """Merge linears, compile kernels and capture graphs: no request waits for that."""
        model, shape = self.model, self.model.config.vision
        self.gpu_decoder = GpuDecoder(model.language_model, cache)
        self.gpu_sampler = GpuSampler(self.stream, self.vocab)
        tower: Callable[[Tensor], Tensor] | None = None
        if isinstance(model.vision_tower, SigLIP) and isinstance(shape, VisionConfig):
            tower = GpuTower(model.vision_tower, shape)
        elif isinstance(model.vision_tower, EfficientNet):
            tower = model.vision_tower
        if tower is not None:
            crops, side = min(8, self.max_batched_images), shape.image_size
            pixels = torch.zeros((crops, 3, side, side), dtype=self.dtype, device=self.device)
            self.tower_graphs = CudaGraphTower(
                lambda pixels: model.multi_modal_projector(tower(pixels)), pixels, self.stream
            )
            self.tower_graphs.capture()
        if not self.batch_invariant:
            self.graphs = CudaGraphDecoder(
                self._decode_step,
                cache,
                self.stream,
                context=model.config.text.context,
                max_num_seqs=max_num_seqs,
            )
            self.graphs.capture()
        if self.stream.no_capture is None:
            self._warm_up(cache)
        failed = [g.unavailable for g in (self.graphs, self.tower_graphs) if g and g.unavailable]
        if failed and self.device.type == "cuda":
            warnings.warn(
                f"no CUDA graphs ({failed[0]}): steps are launched one by one", stacklevel=2
            )

    def _warm_up(self, cache: PagedKVCache) -> None:
        """Compile what graphs do not have: steps with a prompt, for all sizes of a quantized
        product's blocks, and sampling with penalties and with a bias."""
        assert self.gpu_decoder is not None and self.gpu_sampler is not None
        for most in (20, 40, triton.MAX_FUSED_ROWS):
            count = min(most, self.model.config.text.context - 1)
            blocks = [cache.num_blocks] * -(-count // cache.block_size)  # the padding block
            kv = SequenceKV(CacheKey.of([]), blocks=blocks)
            spans = [Span(kv, 0, 1), Span(kv, 0, count)]
            batch, (tokens,) = cache.batch(spans, self.stream, [0] * (1 + count))
            hidden = self.gpu_decoder(self.model.embed(tokens), batch)[:1]
        logits, _ = self._best(self.model.logits(hidden))
        logits = logits.index_select(0, self.stream.upload_numbers([0]))  # of `vocab` apart
        one = SamplingParams(max_new_tokens=1, temperature=1.0, seed=0)
        for how in (replace(one, repetition_penalty=1.1), replace(one, logit_bias={0: 1.0})):
            request = Request(0, Prompt([0]), how, CacheKey.of([0]), 1, 0.0, finish_reason="abort")
            sampler = Sampler(how, [0], self.vocab, self.device)
            self.gpu_sampler([request], [sampler], logits)
        self.stream.synchronize()

    def _decode_step(self, tokens: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor]:
        """Logits `[N, vocab]` and their argmax after one more token of each sequence."""
        assert self.gpu_decoder is not None
        hidden = self.gpu_decoder(self.model.embed(tokens), batch)
        return self._best(self.model.logits(hidden))

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of valid tokens, and their argmax."""
        logits = mask_invalid_tokens(logits, self.vocab, self.model.config.placeholder_ids)
        largest, best = logits.max(-1)
        return logits, mark_not_finite(best, largest)

    @property
    def attention(self) -> str:
        """A description of the attention backend and of CUDA graphs."""
        if isinstance(self.kv_cache, ContiguousKVCache):
            return self.kv_cache.attention
        reason: str | None = "SDPA runs sequence by sequence"
        if self.batch_invariant:
            reason = "batch-invariant"
        if self.graphs is not None:
            reason = self.graphs.unavailable
        graphs = "CUDA graphs" if reason is None else f"no CUDA graphs ({reason})"
        return f"{self.kv_cache.attention}; {graphs}"

    @torch.inference_mode()
    def largest_step(self, tokens: int, num_logits: int) -> None:
        """Compute a step with so many tokens of one prompt, and rows of logits that are sampled;
        and the most images at a time."""
        cache, side = self.kv_cache, self.model.config.vision.image_size
        assert isinstance(cache, PagedKVCache)
        with self.stream.active():
            pixels = torch.zeros(
                (self.max_batched_images, 3, side, side), dtype=self.dtype, device=self.device
            )
            features = self._encode_images(pixels, "").flatten(0, 1)[:tokens]
            kv = SequenceKV(CacheKey.of([]), blocks=list(range(cache.num_blocks)))
            rows = range(max(0, tokens - num_logits), tokens)
            batch, (ids, outputs) = cache.batch(
                [Span(kv, 0, tokens)], self.stream, [0] * tokens, rows
            )
            x = self.model.embed(ids, [(0, features)])
            if self.gpu_decoder is not None:
                hidden = self.gpu_decoder(x, batch)
            else:
                hidden = self.model.forward(x, batch.positions, cache.attend(batch))
            logits = self.model.logits(hidden.index_select(0, outputs)).float()
            logits.softmax(-1).sort(-1)
            self.stream.synchronize()

    def recover(self, error: BaseException) -> None:
        """After a step that ran out of memory, free what it had allocated."""
        if isinstance(error, torch.OutOfMemoryError):
            error.__traceback__ = None  # its frames hold tensors
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def run(self, output: SchedulerOutput) -> list[list[Pick]]:
        """Compute a step. For each request that samples: its accepted draft tokens and one more."""
        self._encoding = None
        with self.stream.active():
            if output.encoder_inputs:
                self._encode(output)
            picks = self._run(output.scheduled)
            if not picks:
                self.stream.synchronize()
            if self._encoding is not None:
                self._count_encoding(output)
        return picks

    def _run(self, scheduled: list[ScheduledRequest]) -> list[list[Pick]]:
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
        finish, found = None, dict[ScheduledRequest, list[Pick]]()
        if any(one.request.host_sampled for one in ready):  # and so the step is not one ahead
            found = dict(zip(ready, self._pick(ready, step.logits), strict=True))
        else:
            step, finish = self._sample_rows(ready, step)
            if len(ready) == len(scheduled):
                self._in_flight = self._launch_next(scheduled, step)
        others = iter(self._compute([one for one in scheduled if one.kv not in step.rows]))
        if finish is not None:
            picks = finish(step.tokens(one.kv for one in ready))
            found = {one: [pick] for one, pick in zip(ready, picks, strict=True)}
        return [found[one] if one in found else next(others) for one in scheduled if one.sample]

    def _sample_rows(
        self, ready: list[ScheduledRequest], step: InFlightStep
    ) -> tuple[InFlightStep, Callable[[list[int]], list[Pick]]]:
        """Sample at rows of a step on the device, those that are not its argmax, and the function
        that makes picks of the tokens once they are on the host."""
        sampled = [one for one in ready if not one.request.argmax_only]
        if not sampled:
            return step, lambda tokens: [Pick(token) for token in tokens]
        assert self.gpu_sampler is not None
        rows = self.stream.upload_numbers([step.rows[one.kv] for one in sampled])
        requests = [one.request for one in sampled]
        samplers = [self._sampler(one) for one in sampled]
        tokens, finish = self.gpu_sampler(requests, samplers, step.logits.index_select(0, rows))
        best = step.best.index_copy(0, rows, tokens)

        def picks(tokens: list[int]) -> list[Pick]:
            pairs = zip(ready, tokens, strict=True)
            own = iter(finish([token for one, token in pairs if not one.request.argmax_only]))
            pairs = zip(ready, tokens, strict=True)
            return [Pick(token) if one.request.argmax_only else next(own) for one, token in pairs]

        return replace(step, best=best, download=self.stream.download(best)), picks

    def _launch_next(
        self, scheduled: list[ScheduledRequest], step: InFlightStep
    ) -> InFlightStep | None:
        """Launch the step after this one before its tokens are on the host, if that is possible.

        The row of an answer that turns out to have ended is ignored: it wrote behind the answer's
        last token, where nothing is read.
        """
        assert self.graphs is not None
        going_on = [one for one in scheduled if one.stop < one.request.max_kv_tokens]
        full = any(one.stop == one.kv.capacity for one in going_on)
        if any(one.request.drafter is not None for one in scheduled):
            return None
        if not going_on or self.graphs.unavailable is not None or full:
            return None
        return self.graphs(
            [DecodeRow(one.kv, one.stop, step.rows[one.kv]) for one in going_on], step
        )

    def _compute(self, scheduled: list[ScheduledRequest]) -> list[list[Pick]]:
        """`run` without CUDA graphs, for requests whose KV memory is ready."""
        hidden: dict[ScheduledRequest, Tensor] = {}
        fused = [one for one in scheduled if self._uses_fused(one)]
        plain = [one for one in scheduled if not self._uses_fused(one)]
        batches = [fused, plain]
        if self.batch_invariant:  # the fused layers of a CPU are by themselves
            batches = [fused] if self.fused is not None else [[one] for one in fused]
            batches += [[one] for one in plain]
        for batch in batches:
            if computed := [one for one in batch if one.start < one.stop]:
                hidden |= self._forward(computed)
        rows = [hidden[one] for one in scheduled if one.sample]
        if not rows:
            return []
        each = self.batch_invariant and self.fused is None
        logits = torch.cat([self.model.logits(x) for x in (rows if each else [torch.cat(rows)])])
        logits = mask_invalid_tokens(logits, self.vocab, self.model.config.placeholder_ids)
        return self._pick([one for one in scheduled if one.sample], logits)

    def _uses_fused(self, one: ScheduledRequest) -> bool:
        """Whether fused layers compute its tokens; does not depend on the rest of the step."""
        has_fused = self.fused is not None or self.gpu_decoder is not None
        return has_fused and not one.request.adapter

    def _forward(self, batch: list[ScheduledRequest]) -> dict[ScheduledRequest, Tensor]:
        """Hidden states `[num_logits, D]` of requests that all use the fused layers, or all not."""
        if isinstance(self.kv_cache, PagedKVCache):
            return self._forward_paged(batch, self.kv_cache)
        positions = torch.tensor(
            [position for one in batch for position in range(one.start, one.stop)],
            device=self.device,
        )
        tokens = torch.tensor(_tokens(batch), device=self.device)
        x = self.model.embed(tokens, self._feature_spans(batch))
        spans = [Span(one.kv, one.start, one.stop) for one in batch]
        if self.fused is not None and self._uses_fused(batch[0]):
            sequences = zip(spans, batch, strict=True)
            outputs = self.fused(
                x, positions, [fused_sequence(span, one.num_logits) for span, one in sequences]
            )
            return dict(zip(batch, outputs.split([one.num_logits for one in batch]), strict=True))
        with self.adapter_routing.through(_adapter_spans(batch)):
            hidden = self.model.forward(x, positions, self.kv_cache.attend(spans))
        parts = hidden.split([one.stop - one.start for one in batch])
        pairs = zip(parts, batch, strict=True)
        return {one: part[len(part) - one.num_logits :] for part, one in pairs}

    def _forward_paged(
        self, batch: list[ScheduledRequest], cache: PagedKVCache
    ) -> dict[ScheduledRequest, Tensor]:
        """`_forward` over a paged KV cache. All numbers go to the device in one copy."""
        batch = sorted(batch, key=lambda one: one.stop - one.start != 1)  # single tokens first
        spans, rows, first = [], list[int](), 0
        for one in batch:
            spans.append(Span(one.kv, one.start, one.stop))
            first += one.stop - one.start
            rows += range(first - one.num_logits, first)
        paged, (tokens, outputs) = cache.batch(spans, self.stream, _tokens(batch), rows)
        x = self.model.embed(tokens, self._feature_spans(batch))
        if self.gpu_decoder is not None and self._uses_fused(batch[0]):
            hidden = self.gpu_decoder(x, paged)
        else:
            with self.adapter_routing.through(_adapter_spans(batch)):
                hidden = self.model.forward(x, paged.positions, cache.attend(paged))
        parts = hidden.index_select(0, outputs).split([one.num_logits for one in batch])
        return dict(zip(batch, parts, strict=True))

    def _pick(self, scheduled: list[ScheduledRequest], logits: Tensor) -> list[list[Pick]]:
        """Sample at each row of the logits, up to the first rejected draft token."""
        picked = self._pick_at_once(scheduled, logits)
        picks: list[list[Pick]] = []
        start = 0
        for one in scheduled:
            picks.append([])
            for row, draft_token in enumerate((*one.draft_tokens, None), start):
                pick = picked.get(row) or self._sampler(one).pick(logits[row])
                picks[-1].append(pick)
                if pick.token != draft_token:
                    break
            start += len(one.draft_tokens) + 1
        return picks

    def _pick_at_once(self, scheduled: list[ScheduledRequest], logits: Tensor) -> dict[int, Pick]:
        """The picks of rows that need no host: argmaxes, and on a GPU samples of requests without
        draft tokens. The host waits once."""
        greedy, sampled, row = list[int](), dict[int, ScheduledRequest](), 0
        for one in scheduled:
            if one.request.argmax_only:
                greedy += range(row, row + one.num_logits)
            elif self.gpu_sampler is not None and one.request.drafter is None:
                sampled[row] = one
            row += one.num_logits
        if self.gpu_sampler is None:
            on_host = logits.argmax(-1).tolist() if greedy else ()
            return {row: Pick(on_host[row]) for row in greedy}
        largest, best = logits.max(-1)
        best, finish = mark_not_finite(best, largest), None
        if sampled:
            rows = self.stream.upload_numbers(list(sampled))
            requests = [one.request for one in sampled.values()]
            samplers = [self._sampler(one) for one in sampled.values()]
            tokens, finish = self.gpu_sampler(requests, samplers, logits.index_select(0, rows))
            best = best.index_copy(0, rows, tokens)
        found = self.stream.download(best).wait().tolist()
        picks = {row: Pick(found[row]) for row in greedy}
        if finish is not None:
            mine = finish([found[row] for row in sampled])
            picks |= zip(sampled, mine, strict=True)
        return picks

    def _sampler(self, one: ScheduledRequest) -> Sampler:
        request = one.request
        if request.sampler is None:
            prompt, constraint = request.prompt.tokens, request.constraint
            request.sampler = Sampler(request.sampling, prompt, self.vocab, self.device, constraint)
        return request.sampler

    def _encode(self, output: SchedulerOutput) -> None:
        """Encode the step's images, crops of several requests together, into the cache."""
        began = self.stream.event(self.clock)
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
            rows = self._crop_features(batch, adapter).split([one.layout.crops for one in batch])
            for one, crop_features in zip(batch, rows, strict=True):
                arranged = self.model.arrange(crop_features, one.layout)
                # a view would keep the features of the whole batch in memory
                self.encoder_cache.put(one.key, arranged.clone() if len(batch) > 1 else arranged)
                if self.encoder_disk_cache is not None and not one.private:
                    self.encoder_disk_cache.put(one.key, arranged)
        self._encoding = began, self.stream.event(self.clock)

    def _crop_features(self, batch: list[EncoderInput], adapter: str) -> Tensor:
        """Projected features of all crops of the inputs `[crops, grid * grid, D]`.

        Equal tiles of anyres images are encoded once and stay in the cache: of a screenshot of
        which one tile has changed, that tile and the whole image are new.
        """
        crops: list[Tensor] = []
        keys: list[Key | None] = []
        for one in batch:
            pixels = one.pixels
            crops += pixels
            tiled = one.layout.tiles is not None and not self.batch_invariant
            keys += _tile_keys(one, pixels) if tiled else [None] * len(pixels)
        first: dict[Key | None, int] = {}
        encoded: dict[int, int] = {}  # crop -> its place among those that are encoded
        for index, key in enumerate(keys):
            if key is None or (key not in first and key not in self.encoder_cache):
                encoded[index] = len(encoded)
                if key is not None:
                    first[key] = index
        kept = [None if k is None or k in first else self.encoder_cache[k] for k in keys]
        self.crops_encoded += len(encoded)
        new: Sequence[Tensor] = ()
        if encoded:
            host = self.stream.host(len(encoded), *crops[0].shape, dtype=crops[0].dtype)
            torch.stack([crops[index] for index in encoded], out=host)
            pixels = self.stream.upload(host).to(self.dtype)
            parts = pixels.split(self.max_batched_images)
            with self.adapter_routing.through([(adapter, slice(None))] if adapter else ()):
                made = torch.cat([self._encode_images(part, adapter) for part in parts])
            if len(encoded) == len(crops) and not first:
                return made
            new = made.unbind()
        for key, index in first.items():
            assert key is not None
            self.encoder_cache.put(key, new[encoded[index]].clone())
        return torch.stack(
            [
                new[encoded[first.get(key, index)]] if features is None else features
                for index, (key, features) in enumerate(zip(keys, kept, strict=True))
            ]
        )

    def _count_encoding(self, output: SchedulerOutput) -> None:
        """Count the time that the device took for this step's images."""
        assert self._encoding is not None
        seconds, self._encoding = self.stream.seconds(*self._encoding), None
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
        if self.tower_graphs is not None and not adapter:
            return self.tower_graphs(pixels)
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


def _tokens(batch: list[ScheduledRequest]) -> list[int]:
    """The tokens that requests compute in this step."""
    return [
        token
        for one in batch
        for token in (*islice(one.request.tokens, one.start, one.stop), *one.draft_tokens)
    ]


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


def _tile_keys(one: EncoderInput, pixels: Tensor) -> list[Key]:
    """Keys of single crops by their pixels, within the salt of the input's key."""
    salt = one.key[0][: -len(one.media.key)]
    crops = (crop.contiguous().flatten().view(torch.uint8).numpy() for crop in pixels)
    return [(salt + sha256(crop).digest(), -2) for crop in crops]
