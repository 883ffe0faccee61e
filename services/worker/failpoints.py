"""Faults that tests plant in a worker: named, off unless BATON_FAILPOINTS lists them.

corrupt_own_block       once: scrambles a block as soon as it is sealed
corrupt_sealed_block    once: scrambles a block as it is announced, before its reader pulls it
corrupt_state           once: scrambles a slot as it is announced, before its reader pulls it
corrupt_checkpoint      once: scrambles a state as soon as it is kept for later prompts
swap_sealed_blocks      once: exchanges the bytes of two blocks as they are announced
slow_steps              every step takes 50 ms longer
slow_pulls              every pull takes 500 ms longer
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence

from baton.shared.engine.kv_cache import KvCache
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

_KNOWN = {
    "corrupt_own_block",
    "corrupt_sealed_block",
    "corrupt_state",
    "corrupt_checkpoint",
    "swap_sealed_blocks",
    "slow_steps",
    "slow_pulls",
}
_STEP_DELAY_S = 0.05
_PULL_DELAY_S = 0.5


class Failpoints:
    def __init__(self, armed: set[str]) -> None:
        unknown = armed - _KNOWN
        if unknown:
            raise ValueError(f"BATON_FAILPOINTS: unknown {', '.join(sorted(unknown))}")
        self._armed = armed
        if armed:
            log_event(
                logger, logging.WARNING, "failpoints are armed", names=",".join(sorted(armed))
            )

    @classmethod
    def from_environment(cls) -> Failpoints:
        return cls({name for name in os.environ.get("BATON_FAILPOINTS", "").split(",") if name})

    def after_seal(self, cache: KvCache, group: int, block_ids: Sequence[int]) -> None:
        if "corrupt_own_block" in self._armed and block_ids:
            self._scramble("corrupt_own_block", cache, group, block_ids[0])

    def after_keep(self, cache: KvCache, group: int, slot: int) -> None:
        if "corrupt_checkpoint" in self._armed:
            self._scramble("corrupt_checkpoint", cache, group, slot)

    def before_announcing(self, cache: KvCache, group: int, block_ids: Sequence[int]) -> None:
        name = "corrupt_sealed_block" if cache.groups[group].spec.grows else "corrupt_state"
        if name in self._armed and block_ids:
            self._scramble(name, cache, group, block_ids[0])
        if "swap_sealed_blocks" in self._armed and len(block_ids) >= 2:
            first, second = block_ids[:2]
            self._fire("swap_sealed_blocks", [first, second])
            blocks = cache.tensors[group]
            blocks[[first, second]] = blocks[[second, first]]

    def _scramble(self, name: str, cache: KvCache, group: int, block_id: int) -> None:
        """Far from what it was: had it been served, other tokens would show it."""
        self._fire(name, [block_id])
        for tensor in cache.typed(group):
            tensor[block_id].neg_().add_(3)

    def before_step(self) -> None:
        if "slow_steps" in self._armed:
            time.sleep(_STEP_DELAY_S)

    def after_pull(self) -> None:
        if "slow_pulls" in self._armed:
            time.sleep(_PULL_DELAY_S)

    def _fire(self, name: str, block_ids: list[int]) -> None:
        self._armed.discard(name)
        log_event(logger, logging.WARNING, "failpoint fired", failpoint=name, blocks=block_ids)
