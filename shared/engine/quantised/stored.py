"""Layers whose weights a GPU reads as they are stored: which quantised weights kernels take.

Those that it does not take (groups of unequal size, parts that are stored in different ways) are
expanded to the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baton.kernels.quantised_rows import MOST_COLUMNS
from baton.kernels.reference_scaled import GROUP, InputScheme
from baton.kernels.scaled_linear import LEAST_COLUMNS
from baton.kernels.small_linear import SmallWeight, pack_nibbles, takes
from baton.shared.engine.linear import Linear
from baton.shared.engine.quantised.weight import QuantisedWeight

_NUM_SIGNED = {4: 8, 8: 128}
"""Half of the range, by bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLinear(Linear):
    """`weight` is empty."""

    stored: SmallWeight

    @property
    def is_small(self) -> bool:
        return True

    @property
    def num_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.stored.num_bytes + bias


def pack_stored(
    parts: Sequence[Tensor | QuantisedWeight], *, takes_float8: bool
) -> SmallWeight | None:
    """All parts as one; None: no kernel takes that."""
    quantised = [part for part in parts if isinstance(part, QuantisedWeight)]
    if len(quantised) < len(parts):
        return None
    first = quantised[0]
    columns = None
    if any(part.group_of is not None for part in quantised):
        ordered = first.in_order() if len(quantised) == 1 else None
        if ordered is None:
            return None
        first, columns = ordered
        quantised = [first]
    dtype, num_in = first.codes.dtype, first.num_in
    is_float = dtype.is_floating_point
    if any(part.codes.dtype != dtype for part in quantised) or (is_float and not takes_float8):
        return None
    num_out = sum(part.num_out for part in quantised)
    counts = {part.scale.shape[1] for part in quantised}
    num_groups = max(counts)
    if any(num_groups % count for count in counts):
        return None
    is_packed = max(part.num_bits for part in quantised) <= 4
    is_packed = is_packed and takes(num_out, num_in, num_groups, is_packed=True)
    if not takes(num_out, num_in, num_groups, is_packed=is_packed):
        return None
    if first.is_meta:
        return _on_paper(quantised, num_out, num_groups, columns, is_packed=is_packed)
    pieces = [_signed(part, num_groups) for part in quantised]
    codes, scale, offset = (torch.cat(each) for each in zip(*pieces, strict=True))
    return SmallWeight(
        pack_nibbles(codes) if is_packed else codes.contiguous(),
        scale,
        offset if bool(offset.any()) else None,
        num_in,
        columns,
    )


def scaled(stored: SmallWeight, inputs: InputScheme) -> SmallWeight | None:
    """The weight as products with such inputs take it; None: they do not."""
    is_float = stored.codes.dtype == torch.float8_e4m3fn
    if stored.is_packed or stored.offset is not None or stored.columns is not None:
        return None
    if inputs.dtype.is_floating_point != is_float or stored.num_in % LEAST_COLUMNS:
        return None
    if stored.num_in > MOST_COLUMNS:
        return None
    num_groups = stored.scale.shape[1]
    if not inputs.group:
        return stored if num_groups == 1 else None
    if inputs.group != GROUP or num_groups * GROUP != stored.num_in:
        return None
    if stored.scale.is_meta:
        num_blocks = -(-stored.num_out // GROUP)
        compact = stored.scale.new_empty((num_blocks, num_groups))
        return replace(stored, scale=compact, rows_per_scale=GROUP)
    compact = stored.scale[::GROUP].contiguous()
    spread = compact.repeat_interleave(GROUP, 0)[: stored.num_out]
    if not torch.equal(spread, stored.scale):
        return None
    return replace(stored, scale=compact, rows_per_scale=GROUP)


def _signed(part: QuantisedWeight, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes around zero, and float32 [out, groups]: what they are multiplied by, what is added."""

    def by_group(numbers: Tensor) -> Tensor:
        repeated = numbers.float().repeat_interleave(num_groups // numbers.shape[1], 1)
        return repeated.expand(part.num_out, num_groups)

    codes, scale = part.codes, by_group(part.scale)
    offset = torch.zeros_like(scale) if part.offset is None else by_group(part.offset)
    middle = torch.zeros_like(scale) if part.zero is None else by_group(part.zero)
    if codes.dtype == torch.uint8:
        moved = _NUM_SIGNED[4 if part.num_bits <= 4 else 8]
        codes = (codes.to(torch.int16) - moved).to(torch.int8)
        middle = middle - moved
    return codes, scale.contiguous(), offset - middle * scale


def _on_paper(
    parts: Sequence[QuantisedWeight],
    num_out: int,
    num_groups: int,
    columns: Tensor | None,
    *,
    is_packed: bool,
) -> SmallWeight:
    """Offsets counted where there may be some."""
    num_in = parts[0].num_in
    width = num_in // 2 if is_packed else num_in
    dtype = torch.uint8 if is_packed else parts[0].codes.dtype
    codes = parts[0].codes.new_empty((num_out, width), dtype=dtype)
    scale = codes.new_empty((num_out, num_groups), dtype=torch.float32)
    has_offset = any(
        part.codes.dtype == torch.uint8 or part.zero is not None or part.offset is not None
        for part in parts
    )
    return SmallWeight(codes, scale, scale if has_offset else None, num_in, columns)
