"""Logprobs of a step on the device: computed behind its own work, and only when a row asks.

    hidden states ─► logits ─► draw ─► tokens ───────────────────┐
          └────────► logits again ─► log-probabilities, a slice ─┴─► what is told ─► to the host

Neither a CUDA graph nor the draw leaves the model's own logits behind, so the head makes them again
of what the step's last layer gave, in the same shape, and they come out as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.shared.engine.batch import BatchRow
from baton.shared.engine.logprobs import (
    log_probabilities,
    packed_logprobs,
    rows_at_once,
    unpacked_logprobs,
)
from baton.shared.kv.drawn import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Told:
    """Logprobs on their way to the host."""

    num_top: Sequence[int]
    """How many of the likeliest tokens each row asks for."""
    packed: Tensor
    """As `packed_logprobs`; there when the stream is."""
    places: Sequence[int] = ()
    """Of drawn tokens: which of the step's they are of."""

    def result(self) -> list[TokenLogprobs | None]:
        return unpacked_logprobs(self.packed.numpy(), self.num_top)


def tell_of_drawn(
    logits: Tensor, places: Sequence[int], num_top: Sequence[int], tokens: Tensor
) -> Told:
    """
    Args:
        logits: [R, vocab], as the model made them.
        places: of the rows that ask, among all R.
        tokens: int32 [R], drawn; −1 where the logits were not numbers.
    """
    on_device = _sent(places, logits.device)
    targets = tokens.index_select(0, on_device)
    told = []
    for start in range(0, len(places), most := rows_at_once(logits.shape[1])):
        rows = on_device[start : start + most]
        logprobs = log_probabilities(logits.index_select(0, rows))
        told.append(packed_logprobs(logprobs, targets[start : start + most]))
    return Told(num_top, _to_host(torch.cat(told)), places)


def tell_of_prompt(
    hidden: Tensor,
    first: int,
    token_ids: Sequence[int],
    num_top: int,
    head: Callable[[Tensor], Tensor],
    *,
    most: int,
    padded: Callable[[int], int],
) -> Told:
    """
    Args:
        hidden: [T, hidden], of all of a step's tokens.
        first: the one that the first of `token_ids`, a prompt's, follows.
        head: [n, hidden] → logits [n, vocab].
        most: so many rows of logits are there at the same time.
        padded: number of rows → for how many the head's kernels are compiled.
    """
    targets = _sent(token_ids, hidden.device)
    told = []
    for start in range(0, len(token_ids), most):
        num_tokens = min(most, len(token_ids) - start)
        places = torch.arange(padded(num_tokens), device=hidden.device).clamp_max(num_tokens - 1)
        logits = head(hidden.index_select(0, places + (first + start)))[:num_tokens]
        told.append(packed_logprobs(log_probabilities(logits), targets[start : start + num_tokens]))
    return Told([num_top] * len(token_ids), _to_host(torch.cat(told)))


def asking(wanted: Sequence[int], rows: Sequence[BatchRow]) -> tuple[list[int], list[int]]:
    """Places in `wanted`, which says of each drawn token for which row it is, of those whose
    logprobs are wanted; and how many likeliest ones."""
    num_top = [None if row.sampling is None else row.sampling.logprobs for row in rows]
    places = [place for place, row in enumerate(wanted) if row >= 0 and num_top[row] is not None]
    return places, [num_top[wanted[place]] or 0 for place in places]


def _sent(values: Sequence[int], device: torch.device) -> Tensor:
    """int32 [n]; nothing waits for the device."""
    is_cuda = device.type == "cuda"
    return torch.tensor(values, dtype=torch.int32, pin_memory=is_cuda).to(device, non_blocking=True)


def _to_host(packed: Tensor) -> Tensor:
    is_cuda = packed.device.type == "cuda"
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=is_cuda)
    return host.copy_(packed, non_blocking=True)
