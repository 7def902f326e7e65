"""Cache of the vision encoder's output: image features by encoder input."""

from __future__ import annotations

from collections import Counter, OrderedDict

import torch
from torch import Tensor

from ..prompt import Media
from .request import encoder_inputs

Key = tuple[bytes, int]


class EncoderCache:
    """Features `[tokens, D]` by `EncoderInput.key`, and of single tiles, evicted in LRU order above
    `max_bytes`.

    Held features are never evicted, and may exceed the limit.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._features: OrderedDict[Key, Tensor] = OrderedDict()
        self._holds: Counter[Key] = Counter()

    def __contains__(self, key: Key) -> bool:
        return key in self._features

    def __getitem__(self, key: Key) -> Tensor:
        self._features.move_to_end(key)
        return self._features[key]

    def features(self, media: Media, salt: bytes) -> Tensor | None:
        """All tokens of a media `[length, D]`; None if a part is not cached."""
        keys = [one.key for one in encoder_inputs(media, salt)]
        if not all(key in self._features for key in keys):
            return None
        return torch.cat([self._features[key] for key in keys])

    def put(self, key: Key, features: Tensor) -> None:
        assert key not in self._features
        self._features[key] = features
        self.bytes += features.nbytes
        self._evict()

    def hold(self, key: Key) -> None:
        """Keep these features, also future ones, until as many calls of `release`."""
        self._holds[key] += 1

    def release(self, key: Key) -> None:
        self._holds[key] -= 1
        if not self._holds[key]:
            del self._holds[key]
            self._evict()

    def clear(self) -> None:
        max_bytes, self.max_bytes = self.max_bytes, 0
        self._evict()
        self.max_bytes = max_bytes

    def _evict(self) -> None:
        if self.bytes > self.max_bytes:
            for key in [key for key in self._features if key not in self._holds]:
                self.bytes -= self._features.pop(key).nbytes
                if self.bytes <= self.max_bytes:
                    break

    def check(self, holds: Counter[Key]) -> None:
        """Assert the number of bytes, and that exactly `holds` are held."""
        assert self.bytes == sum(rows.nbytes for rows in self._features.values())
        held = sum(rows.nbytes for key, rows in self._features.items() if key in holds)
        assert self.bytes <= self.max_bytes + held
        assert self._holds == holds, (self._holds, holds)
