"""Linear layers: what a model asks for, what a checkpoint holds, and what is computed with.

    LinearSpec    a model's wish: parts side by side, how ranks share them
        │               by part: plain numbers, or a `QuantisedWeight` (quantised/)
        ▼
    expand        each part in the activations' dtype, this rank's share of it, one under another
        │ Operations.pack_linear
        ▼
    Linear        what `linear`, `norm_linear` and `norm_gate_up` take; models never look inside

A form of weights that is computed as it is stored becomes a kind of `Linear` of its own, made by
`Operations.load_linear` from the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from baton.kernels.reference_scaled import InputScheme
from baton.shared.engine.quantised.quantise import Method, quantise
from baton.shared.engine.quantised.read import read_quantised
from baton.shared.engine.quantised.scheme import Quantization
from baton.shared.engine.quantised.weight import QuantisedWeight
from baton.shared.engine.weight_headers import Header
from baton.shared.kv.cache_spec import units_of_rank
from baton.shared.model_files.fields import ModelError

_WHOLE = slice(None)
Order = tuple[int, ...] | None
"""Which of a checkpoint's numbers stands at each place here; None: the same."""


class Split(Enum):
    """How tensor-parallel ranks share a layer."""

    REPLICATED = "replicated"
    COLUMNS = "columns"
    """Each has some of the outputs, for all inputs."""
    ROWS = "rows"
    """Each has all outputs, for some of the inputs; the results are added up."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of the ranks this is."""

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[Tensor], object] | None = None
    """Replaces a tensor by the sum of all ranks' tensors; needed from two ranks on."""

    def share(self, size: int, unit: int) -> slice:
        """This rank's part of `size` outputs or inputs, which come in units that stay whole.

        With fewer units than ranks, neighbouring ranks have the same one.

        Raises:
            ModelError: the units cannot be divided evenly.
        """
        try:
            own = units_of_rank(size // unit, self.rank, self.size)
        except ValueError as error:
            raise ModelError(str(error)) from None
        return slice(own.start * unit, own.stop * unit)


@dataclass(frozen=True, slots=True)
class Part:
    """Outputs that a checkpoint keeps in one place: a module of it, or some rows of one."""

    module: str
    """Its tensors are called `module` and a suffix: .weight, .bias, .weight_scale."""
    num_out: int
    has_bias: bool = False
    first: int = 0
    """The module's row that is this part's first."""
    module_out: int | None = None
    """Rows of the whole module; None: there are no others."""
    unit: int = 1
    """Ranks share the outputs in runs of so many, as a head."""
    order: Order = None
    """Of the outputs of each run."""
    between: tuple[int, int] | None = None
    """Of a module whose parts alternate: how many of its rows each unit is among, and where in them
    it begins. None: the part's rows stand together."""

    @property
    def taken(self) -> tuple[Order, int]:
        """Which rows of each run of the module are taken, None for all as they are, and how long
        such a run is."""
        if self.between is None:
            return self.order, len(self.order or ()) or self.unit
        num_rows, start = self.between
        return tuple(start + place for place in self.order or range(self.unit)), num_rows


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """A layer as a model wants it: its parts' outputs stand side by side."""

    num_in: int
    parts: tuple[Part, ...]
    split: Split = Split.REPLICATED
    in_unit: int = 1
    """Ranks share the inputs in runs of so many."""
    scale: float = 1.0
    """What the results are multiplied by, bias included, before a residual is added."""
    is_wide: bool = False
    """Weights and products are float32, whatever the activations are."""
    stays_plain: bool = False
    """Plain weights are not quantised here, whatever is asked for."""
    quantise: Method | None = None
    """Makes plain weights small; set by the loader."""


class PartReader(Protocol):
    """What `expand` needs of whoever loads a model."""

    @property
    def quantises_inputs(self) -> bool:
        """Activations are made small where a checkpoint says so."""

    @property
    def dtype(self) -> torch.dtype:
        """The activations'."""

    @property
    def quantization(self) -> Quantization | None:
        """What config.json says of quantised weights; None: nothing."""

    def header(self, name: str) -> Header | None:
        """None: nothing of that name is stored."""

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = ()) -> Tensor:
        """As it is stored, on the device that computes."""

    def read_known(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A small tensor whose numbers decide how others are kept: as `read`, and on paper, too, it
        holds them, in the host's memory; unless these others are expanded anyway."""

    def read_float(
        self,
        name: str,
        shape: tuple[int, ...],
        part: tuple[slice, ...] = (),
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """In the activations' dtype, if no other is asked for."""

    def error(self, name: str, reason: str) -> ModelError: ...


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix in the activations' dtype. Further kinds of layers join here."""

    weight: Tensor
    """[num_out, num_in], in whatever form the operations packed it."""
    bias: Tensor | None
    """[num_out]"""
    num_out: int
    num_in: int
    all_reduce: Callable[[Tensor], object] | None = None
    """Of a layer split by rows: adds up the ranks' products, before bias and residual."""
    scale: float = 1.0
    """See `LinearSpec`."""
    inputs: InputScheme | None = None
    """How what is multiplied is made small first."""

    @property
    def is_small(self) -> bool:
        """Computed as it is stored."""
        return False

    @property
    def num_bytes(self) -> int:
        num_numbers = self.num_out * (self.num_in + (self.bias is not None))
        return num_numbers * self.weight.dtype.itemsize


def reordered(numbers: Tensor, order: Order, run: int | None = None) -> Tensor:
    """numbers [n · run, …], of every run of rows these, in that order; if nothing else is said, a
    run is as long as the order."""
    if order is None:
        return numbers
    run = run or len(order)
    if numbers.is_meta:
        # On paper only the shape counts, and to index there loads torch's compiler.
        return numbers[: len(numbers) // run * len(order)]
    index = torch.tensor(order, device=numbers.device)
    runs = numbers.view(-1, run, *numbers.shape[1:])
    return runs.index_select(1, index).view(-1, *numbers.shape[1:])


def expand(spec: LinearSpec, reader: PartReader, ranks: Ranks) -> tuple[Tensor, Tensor | None]:
    """This rank's weight [out, in] and bias [out], in the activations' dtype or float32.

    Parts without a bias beside parts with one get zeros.

    Raises:
        ModelError: a tensor is missing, has another shape, or a form that is not served.
    """
    weight = joined(read_parts(spec, reader, ranks), dtype_of(spec, reader))
    return weight, read_bias(spec, reader, ranks)


def joined(parts: Iterable[Tensor | QuantisedWeight], dtype: torch.dtype) -> Tensor:
    """One below the other, expanded."""
    return _joined([each if isinstance(each, Tensor) else each.expand(dtype) for each in parts])


def common_inputs(parts: Sequence[Tensor | QuantisedWeight]) -> InputScheme | None:
    """How what all parts are multiplied by is made small: none of them has it otherwise. Of scales
    that are given the largest counts, which cuts no part's inputs."""
    schemes = [each.inputs if isinstance(each, QuantisedWeight) else None for each in parts]
    first = schemes[0]
    if first is None:
        return None
    scales: list[Tensor] = []
    for each in schemes:
        if each is None or (each.dtype, each.group) != (first.dtype, first.group):
            return None
        if each.scale is not None:
            scales.append(each.scale)
    if not scales:
        return first
    if len(scales) < len(schemes):
        return None
    return replace(first, scale=scales[0] if scales[0].is_meta else torch.stack(scales).amax(0))


def dtype_of(spec: LinearSpec, reader: PartReader) -> torch.dtype:
    return torch.float32 if spec.is_wide else reader.dtype


def read_parts(
    spec: LinearSpec, reader: PartReader, ranks: Ranks
) -> Iterator[Tensor | QuantisedWeight]:
    """This rank's share of each part's weight, one after another; plain ones in `dtype_of`.

    Raises:
        ModelError: as of `expand`.
    """
    columns = _WHOLE
    if spec.split is Split.ROWS:
        own = ranks.share(spec.num_in, spec.in_unit)
        # Of one rank alone the groups of columns stay as they are.
        columns = _WHOLE if own == slice(0, spec.num_in) else own
    for part in spec.parts:
        rows = _rows(part, spec.split, ranks)
        weight = _weight(part, spec, rows, columns, reader)
        order, run = part.taken
        if isinstance(weight, Tensor):
            yield reordered(weight, order, run)
        elif order is None:
            yield weight
        elif weight.is_meta:
            yield weight.part(slice(0, weight.num_out // run * len(order)), _WHOLE)
        else:
            index = _index(order, run, weight.num_out)
            yield weight.take_rows(index.to(weight.codes.device))


def read_bias(spec: LinearSpec, reader: PartReader, ranks: Ranks) -> Tensor | None:
    """This rank's, [out]. ModelError: as of `expand`."""
    if not any(part.has_bias for part in spec.parts):
        return None
    dtype = dtype_of(spec, reader)
    biases: list[Tensor | None] = []
    for part in spec.parts:
        rows = _rows(part, spec.split, ranks)
        bias = _bias(part, rows, reader, dtype) if part.has_bias else None
        biases.append(bias if bias is None else reordered(bias, *part.taken))
    device = next(bias.device for bias in biases if bias is not None)
    return _joined(
        [
            torch.zeros(_num_rows(part, spec.split, ranks), dtype=dtype, device=device)
            if bias is None
            else bias
            for part, bias in zip(spec.parts, biases, strict=True)
        ]
    )


def _index(order: tuple[int, ...], run: int, num_rows: int) -> Tensor:
    """int64: of every run of rows these, in that order."""
    starts = torch.arange(0, num_rows, run)
    return (starts[:, None] + torch.tensor(order)).flatten()


def _rows(part: Part, split: Split, ranks: Ranks) -> slice:
    """Of the part's module, what this rank has."""
    own = slice(0, part.num_out)
    if split is Split.COLUMNS:
        own = ranks.share(part.num_out, part.unit)
    if part.between is not None:
        run = part.between[0]
        own = slice(own.start // part.unit * run, own.stop // part.unit * run)
    rows = slice(part.first + own.start, part.first + own.stop)
    return _WHOLE if rows == slice(0, _module_out(part)) else rows


def _num_rows(part: Part, split: Split, ranks: Ranks) -> int:
    num_rows = len(range(_module_out(part))[_rows(part, split, ranks)])
    return num_rows if part.between is None else num_rows // part.between[0] * part.unit


def _module_out(part: Part) -> int:
    return part.num_out if part.module_out is None else part.module_out


def _joined(tensors: list[Tensor]) -> Tensor:
    """One below the other."""
    if len(tensors) == 1:
        return tensors[0]
    if any(tensor.is_meta for tensor in tensors):
        # torch.cat on paper loads torch's compiler: 75 MB that the process keeps.
        num_rows = sum(len(tensor) for tensor in tensors)
        return tensors[0].new_empty((num_rows, *tensors[0].shape[1:]), device="meta")
    return torch.cat(tensors)


def _bias(part: Part, rows: slice, reader: PartReader, dtype: torch.dtype) -> Tensor:
    which = () if rows == _WHOLE else (rows,)
    return reader.read_float(f"{part.module}.bias", (_module_out(part),), which, dtype=dtype)


def _weight(
    part: Part, spec: LinearSpec, rows: slice, columns: slice, reader: PartReader
) -> Tensor | QuantisedWeight:
    """Rows and columns of a module's weight [module_out, num_in]."""
    shape = (_module_out(part), spec.num_in)
    quantised = read_quantised(part.module, shape, reader)
    if quantised is not None:
        return quantised.part(rows, columns)
    name = f"{part.module}.weight"
    if spec.quantise is not None:
        # Whole, so that the codes are the same however ranks share it.
        whole = reader.read_float(name, shape, dtype=torch.float32)
        made = quantise(whole, spec.quantise)
        if made is not None:
            return made.part(rows, columns)
    which = () if rows == columns == _WHOLE else (rows, columns)
    return reader.read_float(name, shape, which, dtype=dtype_of(spec, reader))
