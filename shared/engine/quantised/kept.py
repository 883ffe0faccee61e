"""Weights that stay as small as they are stored until they are used, as those of experts, of which
a token has few: expanded when they are multiplied, to the very numbers that expanding them when
they are loaded would make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from baton.shared.engine.quantised.bits import nibbles
from baton.shared.engine.quantised.weight import QuantisedWeight

_INTEGERS = {torch.int8: range(-8, 8), torch.uint8: range(16)}
"""Codes of up to four bits, by their dtype."""


def places(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Where among the levels each code stands, the last of equal ones: of int8 or uint8, uint8 of
    the same shape."""
    place = torch.zeros(256, dtype=torch.uint8)
    for index, level in enumerate(levels):
        place[level % 256] = index
    return place.to(codes.device)[codes.view(torch.uint8).int()]


@dataclass(frozen=True, slots=True)
class KeptWeight:
    """[out, in]"""

    weight: QuantisedWeight
    """Without codes where they are packed."""
    packed: Tensor | None
    """uint8 [out, in / 2]: which of the levels a code is, the lower half of a byte first."""
    levels: Tensor | None
    """int8 or uint8 [16]"""

    @classmethod
    def of(cls, weight: QuantisedWeight) -> KeptWeight:
        levels = weight.levels
        if levels is None and weight.num_bits <= 4 and weight.codes.dtype in _INTEGERS:
            levels = tuple(_INTEGERS[weight.codes.dtype])
        if levels is None or weight.num_in % 2:
            return cls(weight, None, None)
        codes = weight.codes
        width = weight.num_in // 2
        if weight.is_meta:
            packed = codes.new_empty((weight.num_out, width), dtype=torch.uint8)
        else:
            of_each = places(codes, levels).view(-1, width, 2)
            packed = of_each[..., 0] | (of_each[..., 1] << 4)
        known = torch.tensor(levels, dtype=codes.dtype, device=codes.device)
        return cls(replace(weight, codes=codes.new_empty(0, weight.num_in)), packed, known)

    @property
    def num_bytes(self) -> int:
        weight = self.weight
        parts = (
            weight.codes, weight.scale, weight.zero, weight.offset, weight.group_of,
            self.packed, self.levels,
        )  # fmt: skip
        return sum(part.nbytes for part in parts if part is not None)

    def expand(self, dtype: torch.dtype) -> Tensor:
        """The numbers, [out, in] of that dtype."""
        if self.packed is None or self.levels is None:
            return self.weight.expand(dtype)
        codes = self.levels[nibbles(self.packed).int()]
        return replace(self.weight, codes=codes).expand(dtype)


@dataclass(frozen=True, slots=True)
class KeptMatrix:
    """Of several parts, one below the other."""

    parts: tuple[KeptWeight, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def expand(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([part.expand(dtype) for part in self.parts])


class Expanding(Sequence[Tensor]):
    """Matrices, each as it is or expanded whenever it is asked for."""

    def __init__(
        self,
        of: Sequence[Tensor | KeptMatrix],
        form: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> None:
        """`form`: what is done with a matrix that was expanded."""
        self._of, self._form, self._dtype = of, form, dtype

    def __len__(self) -> int:
        return len(self._of)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return Expanding(self._of[index], self._form, self._dtype)
        one = self._of[index]
        return one if isinstance(one, Tensor) else self._form(one.expand(self._dtype))


def keep(parts: Sequence[Tensor | QuantisedWeight]) -> KeptMatrix | None:
    """None: there is nothing small, or plain numbers beside it."""
    quantised = [part for part in parts if isinstance(part, QuantisedWeight)]
    if len(quantised) < len(parts):
        return None
    return KeptMatrix(tuple(KeptWeight.of(part) for part in quantised))
