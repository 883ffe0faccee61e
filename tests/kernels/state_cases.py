"""Steps of rows that keep states, as the torch reference and as kernels are told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from baton.kernels.state_plan import (
    NO_ROW,
    NO_SLOT,
    NO_TILE,
    DeviceStatePlan,
    Kept,
    StatePlan,
    state_tiles,
)


@dataclass(frozen=True)
class Row:
    num_tokens: int
    position: int
    slot: int
    keeps: tuple[tuple[int, int], ...] = ()
    """(tokens of the row, slot)"""
    is_single: bool = False
    """Decoded, rather than a chunk of a prompt."""

    @property
    def is_padding(self) -> bool:
        """Among those that decode."""
        return self.is_single and self.slot == NO_SLOT


@dataclass(frozen=True)
class Case:
    rows: Sequence[Row]
    num_slots: int
    num_padding: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows) + self.num_padding

    @property
    def _starts(self) -> list[int]:
        return list(accumulate((row.num_tokens for row in self.rows), initial=0))

    def plan(self) -> StatePlan:
        return StatePlan(
            np.array(self._starts),
            np.array([row.position for row in self.rows]),
            np.array([row.slot for row in self.rows]),
            [Kept(number, *kept) for number, row in enumerate(self.rows) for kept in row.keeps],
        )

    def device_plan(self, device: torch.device, *, of_graph: bool = False) -> DeviceStatePlan:
        """`of_graph`: with room for more of everything."""
        singles = [row for row in self.rows if row.is_single]
        others = self.rows[len(singles) :]
        assert not any(row.is_single for row in others)

        def ints(values: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        rows, tiles = state_tiles(
            self._starts[len(singles) :],
            [row.position for row in others],
            [row.slot for row in others],
            [Kept(number, *kept) for number, row in enumerate(others) for kept in row.keeps],
        )
        num_singles = len(singles)
        if of_graph:
            num_singles = min(num_singles + 3, self.num_tokens)
            rows = np.concatenate((rows, np.array([NO_ROW] * 2, np.int32)))
            tiles = np.concatenate((tiles, np.array([NO_TILE] * 5, np.int32)))
        num_more = num_singles - len(singles) + 1
        return DeviceStatePlan(
            slots=ints([row.slot for row in singles] + [NO_SLOT] * num_more, torch.int64),
            positions=ints([row.position for row in singles] + [7] * num_more, torch.int32),
            num_singles=num_singles,
            rows=torch.from_numpy(rows).to(device) if len(rows) else None,
            tiles=torch.from_numpy(tiles).to(device) if len(tiles) else None,
            num_padding=0 if of_graph else self.num_padding,
            has_kept=of_graph or any(row.keeps for row in others),
            shared={} if of_graph else None,
        )


CASES = {
    "decode, padding among it": Case(
        [Row(1, 5, 2, is_single=True), Row(1, 0, 0, is_single=True)]
        + [Row(1, 0, NO_SLOT, is_single=True), Row(1, 1, 3, is_single=True)],
        5,
    ),
    "short chunks": Case([Row(2, 0, 1), Row(1, 7, 3), Row(3, 1, 0), Row(64, 0, 2)], 4, 3),
    "long chunks, one after a state": Case(
        [Row(1, 9, 4, is_single=True), Row(131, 40, 1), Row(65, 0, 2)], 5, 1
    ),
    "kept in the middle": Case(
        [Row(70, 3, 0, ((1, 3), (2, 4), (66, 5))), Row(5, 0, 1, ((5, 2),))], 6
    ),
    "nobody's": Case([Row(67, 0, NO_SLOT), Row(3, 4, 1)], 2),
}
"""Of at most 131 tokens a row: Triton's interpreter is slow."""


def poisoned_state(case: Case, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[num_slots + 1, heads, layers, …], NaN but for what rows go on from, in bytes of other
    tensors."""
    num_bytes = int(np.prod(shape[2:])) * dtype.itemsize
    slots = torch.full(
        (case.num_slots + 1, *shape[:2], num_bytes + 32), 0xFF, dtype=torch.uint8, device=device
    )
    state = slots[..., 16 : 16 + num_bytes].view(dtype).view(-1, *shape)
    for row in case.rows:
        if row.position and row.slot != NO_SLOT:
            state[row.slot] = torch.randn(shape, device=device).to(dtype)
    return state


def ways_to_compute(num_rows: int, num_tokens: int) -> dict[str, list[tuple[list[int], StatePlan]]]:
    """The same sequences, each in a slot of its own, token `n · num_tokens + t` being the t-th of
    the n-th: the tokens and the plan of each step, where rows of one token share it, where they do
    not, and where they are chunks."""

    def step(rows: Sequence[int], first: int, count: int) -> tuple[list[int], StatePlan]:
        tokens = [row * num_tokens + first + t for row in rows for t in range(count)]
        starts = np.arange(len(rows) + 1) * count
        return tokens, StatePlan(starts, np.full(len(rows), first), np.array(rows))

    everyone = range(num_rows)
    return {
        "together": [step(everyone, t, 1) for t in range(num_tokens)],
        "alone": [step([row], t, 1) for row in everyone for t in range(num_tokens)],
        "chunks": [step(everyone, 0, num_tokens)],
    }
