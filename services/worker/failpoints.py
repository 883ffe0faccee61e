"""Faults that tests plant in a worker: named, one-shot, off unless BATON_FAILPOINTS asks.

    corrupt_sealed_block    flips one bit of a block after it was sealed
    swap_sealed_blocks      exchanges the bytes of two blocks after they were sealed
"""

from __future__ import annotations

import logging
import os

from shared.engine.kv_cache import KvCache

logger = logging.getLogger(__name__)

_KNOWN = {"corrupt_sealed_block", "swap_sealed_blocks"}


class Failpoints:
    def __init__(self, armed: set[str]) -> None:
        unknown = armed - _KNOWN
        if unknown:
            raise ValueError(f"BATON_FAILPOINTS: unknown {', '.join(sorted(unknown))}")
        self._armed = armed
        if armed:
            logger.warning("failpoints armed: %s", ", ".join(sorted(armed)))

    @classmethod
    def from_environment(cls) -> Failpoints:
        return cls({name for name in os.environ.get("BATON_FAILPOINTS", "").split(",") if name})

    def after_seal(self, cache: KvCache, group: int, block_ids: list[int]) -> None:
        if not self._armed:
            return
        blocks = cache.tensors[group]
        if "corrupt_sealed_block" in self._armed and block_ids:
            self._fire("corrupt_sealed_block", block_ids[:1])
            block = blocks[block_ids[0]]
            block.view(-1)[0] = block.view(-1)[0] + 1
        if "swap_sealed_blocks" in self._armed and len(block_ids) >= 2:
            first, second = block_ids[:2]
            self._fire("swap_sealed_blocks", [first, second])
            blocks[[first, second]] = blocks[[second, first]]

    def _fire(self, name: str, block_ids: list[int]) -> None:
        self._armed.discard(name)
        logger.warning("failpoint %s fired on blocks %s", name, block_ids)
