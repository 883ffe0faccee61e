"""Experts whose weights a GPU reads as they are stored: which of them its kernel takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from baton.kernels.experts import SmallExpertWeights
from baton.kernels.small_experts import SmallExperts
from baton.kernels.small_linear import SmallWeight, takes
from baton.shared.engine.experts import Expert
from baton.shared.engine.quantised.fp4 import LEVELS
from baton.shared.engine.quantised.kept import places
from baton.shared.engine.quantised.stored import pack_stored
from baton.shared.engine.quantised.weight import QuantisedWeight


def stack_experts(
    experts: Iterable[Expert], num_experts: int, *, takes_float8: bool
) -> SmallExpertWeights | None:
    """All of a layer; None: some are plain, or stored in a way, or each in another, that the kernel
    does not take."""
    rooms: list[SmallExperts] = []
    biases: list[Tensor | None] = []
    for index, expert in enumerate(experts):
        packed = [_pack(each, takes_float8=takes_float8) for each in (expert.gate_up, expert.down)]
        own = [each for each in packed if each is not None]
        if len(own) < len(packed):
            return None
        own_biases = (expert.gate_up_bias, expert.down_bias)
        if not rooms:
            rooms = [SmallExperts.like(one, num_experts, is_fp4=is_fp4) for one, is_fp4 in own]
            biases = [_room(bias, num_experts) for bias in own_biases]
        for place, (one, is_fp4) in enumerate(own):
            room = rooms[place].put(index, one, is_fp4=is_fp4)
            if room is None:
                return None
            rooms[place] = room
        for all_biases, bias in zip(biases, own_biases, strict=True):
            if all_biases is not None and bias is not None and not bias.is_meta:
                all_biases[index] = bias
    if not rooms:
        return None
    gate_up, down = rooms
    return SmallExpertWeights(gate_up, down, *biases)


def _room(bias: Tensor | None, num_experts: int) -> Tensor | None:
    return None if bias is None else bias.new_empty((num_experts, *bias.shape))


def _pack(
    parts: Sequence[Tensor | QuantisedWeight], *, takes_float8: bool
) -> tuple[SmallWeight, bool] | None:
    """A matrix, and whether its numbers are floats of four bits."""
    quantised = [part for part in parts if isinstance(part, QuantisedWeight)]
    if all(part.levels == LEVELS and part.group_of is None for part in quantised):
        one = _pack_fp4(quantised) if len(quantised) == len(parts) else None
        return None if one is None else (one, True)
    one = pack_stored(parts, takes_float8=takes_float8)
    return None if one is None or one.columns is not None else (one, False)


def _pack_fp4(parts: Sequence[QuantisedWeight]) -> SmallWeight | None:
    num_in, num_runs = parts[0].num_in, parts[0].scale.shape[1]
    num_out = sum(part.num_out for part in parts)
    if any(part.scale.shape[1] != num_runs for part in parts):
        return None
    if not takes(num_out, num_in, num_runs, is_packed=True):
        return None
    if parts[0].is_meta:
        codes = parts[0].codes.new_empty((num_out, num_in // 2), dtype=torch.uint8)
        return SmallWeight(
            codes, codes.new_empty((num_out, num_runs), dtype=torch.float32), None, num_in
        )
    low, high = torch.cat([places(part.codes, LEVELS) for part in parts]).chunk(2, 1)
    scale = torch.cat([part.scale.float().expand(part.num_out, num_runs) for part in parts])
    return SmallWeight(low | (high << 4), scale, None, num_in)
