"""One description of every quantised weight: what all forms of checkpoints become.

    number = (code − zero) · scale + offset

Codes are whole numbers of a byte each, or 8-bit floats; scale, zero and offset hold for a run of a
row's numbers. What computes with it expands it (`expand`) or packs it in its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baton.kernels.reference_scaled import InputScheme

WHOLE = slice(None)
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """[out, in]

    Numbers are made in the scale's dtype, one rounding an operation, and rounded to the asked dtype
    at the end: as those who made the codes make numbers of them, to the same bits.
    """

    codes: Tensor
    """int8, uint8 or an 8-bit float [out, in]"""
    scale: Tensor
    """[out or 1, groups], of a float dtype"""
    num_bits: int
    """That a code needs: integers of 4 lie in a range of 16."""
    levels: tuple[int, ...] | None = None
    """Sixteen numbers, if codes are no others."""
    zero: Tensor | None = None
    """int8, uint8 or int16 [out or 1, groups]"""
    offset: Tensor | None = None
    """[out or 1, groups], of the scale's dtype"""
    group_of: Tensor | None = None
    """int64 [in], the group of each column; None: equal runs in order."""
    inputs: InputScheme | None = None
    """How activations are to be made small, for whoever computes so."""

    @classmethod
    def on_paper(
        cls,
        num_out: int,
        num_in: int,
        num_bits: int,
        num_groups: int,
        dtype: torch.dtype = torch.int8,
        *,
        scale: torch.dtype = torch.float32,
        num_scales: int | None = None,
        zero: torch.dtype | None = None,
        group_of: Tensor | None = None,
    ) -> QuantisedWeight:
        """Of which only shapes and dtypes count, and which column is of which group: `group_of`, in
        the host's memory. `num_scales`: rows that have scales of their own; None: all."""
        codes = torch.empty(num_out, num_in, dtype=dtype, device="meta")
        of_groups = (num_out if num_scales is None else num_scales, num_groups)
        scales = codes.new_empty(of_groups, dtype=scale)
        zeros = None if zero is None else codes.new_empty(of_groups, dtype=zero)
        return cls(codes, scales, num_bits, zero=zeros, group_of=group_of)

    @property
    def num_out(self) -> int:
        return self.codes.shape[0]

    @property
    def num_in(self) -> int:
        return self.codes.shape[1]

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def is_meta(self) -> bool:
        return self.codes.is_meta

    def part(self, rows: slice, columns: slice) -> QuantisedWeight:
        """Some of the rows, and of the columns."""
        if rows == WHOLE and columns == WHOLE:
            return self
        groups = self._groups_of(columns)
        taken = self._with(
            lambda each: (each if len(each) == 1 else each[rows])[:, groups or WHOLE]
        )
        group_of = self.group_of
        if groups is None:
            group_of = self._group_of()[columns]
        return replace(taken, codes=self.codes[rows, columns], group_of=group_of)

    def _groups_of(self, columns: slice) -> slice | None:
        """Those of columns that have whole groups of their own; None: others share them."""
        if columns == WHOLE:
            return WHOLE
        size = self.num_in // self.scale.shape[1]
        first, last, step = columns.indices(self.num_in)
        if self.group_of is not None or step != 1 or first % size or last % size:
            return None
        return slice(first // size, last // size)

    def in_order(self) -> tuple[QuantisedWeight, Tensor] | None:
        """With columns sorted by group, and which these are, int64 [in]; None: groups are of
        different sizes."""
        group_of = self._group_of()
        columns = group_of.argsort(stable=True)
        sizes = group_of.bincount(minlength=self.scale.shape[1])
        if len(set(sizes.tolist())) > 1:
            return None
        codes = self.codes if self.is_meta else self.codes.index_select(1, columns)
        return replace(self, codes=codes, group_of=None), columns

    def take_rows(self, index: Tensor) -> QuantisedWeight:
        """Those rows, in that order: int64 [any]."""
        if self.is_meta:
            return self
        taken = self._with(lambda each: each if len(each) == 1 else each.index_select(0, index))
        return replace(taken, codes=self.codes.index_select(0, index))

    def expand(self, dtype: torch.dtype) -> Tensor:
        """The numbers, [out, in] of that dtype."""
        if self.is_meta:
            # A product on paper would load torch's compiler, as torch.cat does.
            return self.codes.to(dtype)
        numbers = self.codes.to(self.scale.dtype)
        if self.group_of is not None:
            numbers = self._scaled(numbers, self.group_of)
        elif self.scale.shape[1] == 1:
            numbers = self._scaled(numbers, None)
        else:
            runs = numbers.view(self.num_out, self.scale.shape[1], -1)
            numbers = self._with(lambda each: each[..., None])._scaled(runs, None)
        return numbers.reshape(self.codes.shape).to(dtype)

    def _scaled(self, numbers: Tensor, group_of: Tensor | None) -> Tensor:
        def each(of_groups: Tensor) -> Tensor:
            return of_groups if group_of is None else of_groups[:, group_of]

        if self.zero is not None:
            numbers = numbers - each(self.zero).to(numbers.dtype)
        numbers = numbers * each(self.scale)
        return numbers if self.offset is None else numbers + each(self.offset)

    def _group_of(self) -> Tensor:
        if self.group_of is not None:
            return self.group_of
        num_groups, device = self.scale.shape[1], "cpu" if self.is_meta else self.codes.device
        groups = torch.arange(num_groups, device=device)
        return groups.repeat_interleave(self.num_in // num_groups)

    def _with(self, change: Change) -> QuantisedWeight:
        """With what is by group changed."""
        return replace(
            self,
            scale=change(self.scale),
            zero=None if self.zero is None else change(self.zero),
            offset=None if self.offset is None else change(self.offset),
        )
