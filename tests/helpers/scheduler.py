"""Requests and a scheduler without a network."""

from __future__ import annotations

from itertools import count

import torch

from llava_interleave.engine import SamplingParams
from llava_interleave.engine.encoder_cache import EncoderCache
from llava_interleave.engine.prefix_cache import (
    CacheKey,
    MediaId,
    PrefixCache,
)
from llava_interleave.engine.request import Request
from llava_interleave.engine.sampler import Pick
from llava_interleave.engine.scheduler import Scheduler, SchedulerOutput
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.prompt import Media, Prompt

EOS = frozenset({9})
GRID = 2  # four tokens a crop
IDS = count()


def request(
    length: int,
    *,
    new: int = 8,
    crops: tuple[int, ...] = (),
    first: int = 100,
    salt: bytes = b"",
    client: str = "",
    weight: float = 1.0,
) -> Request:
    """A prompt of `length` tokens that begins with media of so many crops; `first` is the first
    text token.
    """
    media, start = [], 0
    for index, n in enumerate(crops):
        media.append(
            Media(torch.zeros(n, 3, 1, 1), ImageTokenLayout(GRID, n), bytes([index, n]), start)
        )
        start += media[-1].layout.length
    prompt = Prompt([7] * start + list(range(first, first + length - start)), tuple(media))
    images = [
        (m.start, m.layout.length, MediaId(1000 * n + i))
        for i, (m, n) in enumerate(zip(media, crops, strict=True))
    ]
    return Request(
        next(IDS),
        prompt,
        SamplingParams(max_new_tokens=new, stop_on_repetition=False),
        CacheKey.of(prompt.tokens, images, salt),
        new,
        0.0,
        client=client,
        weight=weight,
    )


def scheduler(
    total: int = 1000, *, tokens: int = 64, crops: int = 4, running: int = 8, features: int = 10**6
) -> Scheduler:
    return Scheduler(
        PrefixCache(total),
        EncoderCache(features),
        max_num_batched_tokens=tokens,
        max_batched_images=crops,
        max_num_seqs=running,
    )


def step(s: Scheduler, token: int = 5) -> tuple[SchedulerOutput, list[tuple[int, int, int]]]:
    """One step with a network that always says `token`; the output, and (request, start, stop) of
    its works.
    """
    output = s.schedule()
    for key in output.encoder_inputs:
        s.encoder_cache.put(key, torch.zeros(GRID**2, 2))
    done = [(w.request.id, w.start, w.stop) for w in output.scheduled]
    s.commit(output, [[Pick(token)] for w in output.scheduled if w.sample], EOS, 1.0)
    s.prefix_cache.check()
    return output, done
