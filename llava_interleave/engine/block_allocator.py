"""Blocks of a paged KV cache: which are free, and how many sequences share each of the others."""

from __future__ import annotations

from collections.abc import Iterable


class BlockAllocator:
    """Reference counts of `count` blocks of `block_size` tokens."""

    def __init__(self, count: int, block_size: int) -> None:
        self.block_size = block_size
        self.free_blocks = list(range(count))
        self.ref_counts = [0] * count

    def allocate(self, count: int) -> list[int]:
        return self.share([self.free_blocks.pop() for _ in range(count)])

    def share(self, blocks: list[int]) -> list[int]:
        for block in blocks:
            self.ref_counts[block] += 1
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.ref_counts[block] -= 1
            if not self.ref_counts[block]:
                self.free_blocks.append(block)
