"""The experts of a layer: what a model asks for, and the forms in which checkpoints hold them.

    separate    a module for each expert's gate, up and down, as any linear layer (linear.py)
    fused       one tensor for all experts' gates and ups, [experts, 2 · size, hidden], one for
                their downs, [experts, hidden, size]; or both turned round, gate and up alternating
    MXFP4       the latter, each row in runs of 32 numbers of four bits with one exponent

All become the weights of one expert after another, gate above up: plain numbers in the activations'
dtype, or what a quantised checkpoint has of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baton.kernels.reference_experts import ExpertActivation
from baton.shared.engine.linear import (
    LinearSpec,
    Part,
    PartReader,
    Ranks,
    Split,
    joined,
    read_bias,
    read_parts,
)
from baton.shared.engine.quantised import fp4
from baton.shared.engine.quantised.weight import QuantisedWeight

_BLOCK = 32
"""Numbers of an MXFP4 block; two are in a byte, the lower half first."""
_NO_NUMBER = 255
_WHOLE = slice(None)
Matrix = tuple[Tensor | QuantisedWeight, ...]
"""Parts, one below the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Where a checkpoint keeps the experts of a layer."""

    fused_gate_up: str
    fused_down: str
    """Tensors; with a suffix, biases and blocks."""
    gate: str = ""
    up: str = ""
    down: str = ""
    """Modules, with {} for an expert's number; empty: there are no such checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """MLPs of one shape, as a model wants them; of the activation `relu2` they have no gate."""

    names: ExpertNames
    num_experts: int
    num_in: int
    size: int
    """Of what is between an expert's products."""
    activation: ExpertActivation = "silu"
    has_bias: bool = False
    alternates: bool = False
    """Fused tensors are [experts, in, out], and gate and up alternate."""
    may_be_mxfp4: bool = False

    @property
    def num_up(self) -> int:
        """Rows of an expert's first product: gate and up, or up alone."""
        return self.size if self.activation == "relu2" else 2 * self.size


@dataclass(frozen=True, slots=True)
class Experts:
    """What `Operations.experts` computes with; models never look inside."""

    weights: Any
    """In whatever form the operations packed them."""
    activation: ExpertActivation
    num_bytes: int
    is_small: bool = False
    """Computed as they are stored."""
    all_reduce: Callable[[Tensor], object] | None = None
    """Adds up the ranks' results."""


class Expert(NamedTuple):
    """One of them, this rank's share."""

    gate_up: Matrix
    """[2 · size, hidden]; without a gate [size, hidden]"""
    down: Matrix
    """[hidden, size]"""
    gate_up_bias: Tensor | None
    """[2 · size]"""
    down_bias: Tensor | None
    """[hidden]; of the first rank only, since results are added up."""

    @property
    def bias_bytes(self) -> int:
        biases = (self.gate_up_bias, self.down_bias)
        return sum(bias.nbytes for bias in biases if bias is not None)

    def expanded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        weights = joined(self.gate_up, dtype), joined(self.down, dtype)
        return (*weights, self.gate_up_bias, self.down_bias)


def read_experts(spec: ExpertsSpec, reader: PartReader, ranks: Ranks) -> Iterator[Expert]:
    """One after another.

    Raises:
        ModelError: a tensor is missing, has another shape, or a form that is not served.
    """
    names = spec.names
    blocks = f"{names.fused_gate_up}_blocks"
    form = _fused
    if reader.header(blocks) is not None:
        if not spec.may_be_mxfp4:
            raise reader.error(blocks, "MXFP4, but config.json has no such quantization_config")
        form = _mxfp4
    elif names.up and reader.header(names.fused_gate_up) is None:
        form = _separate
    for index in range(spec.num_experts):
        yield form(spec, index, reader, ranks)


def _separate(spec: ExpertsSpec, index: int, reader: PartReader, ranks: Ranks) -> Expert:
    def part(name: str, num_out: int) -> Part:
        return Part(name.format(index), num_out, has_bias=spec.has_bias)

    names = spec.names
    gate_up: tuple[Part, ...] = (part(names.up, spec.size),)
    if spec.num_up > spec.size:
        gate_up = (part(names.gate, spec.size), *gate_up)
    down = (part(names.down, spec.num_in),)
    both = (
        LinearSpec(spec.num_in, gate_up, Split.COLUMNS),
        LinearSpec(spec.size, down, Split.ROWS),
    )
    up_weight, down_weight = (tuple(read_parts(each, reader, ranks)) for each in both)
    up_bias, down_bias = (read_bias(each, reader, ranks) for each in both)
    return Expert(up_weight, down_weight, up_bias, None if ranks.rank else down_bias)


def _fused(spec: ExpertsSpec, index: int, reader: PartReader, ranks: Ranks) -> Expert:
    def read(name: str, num_out: int, num_in: int) -> Tensor:
        shape = (num_in, num_out) if spec.alternates else (num_out, num_in)
        own = _one(reader.read_float, name, (spec.num_experts, *shape), index)
        return own.t() if spec.alternates and not own.is_meta else own.view(num_out, num_in)

    names = spec.names
    gate_up = read(names.fused_gate_up, spec.num_up, spec.num_in)
    down = read(names.fused_down, spec.num_in, spec.size)
    return _shared_out(spec, index, gate_up, down, reader, ranks)


def _mxfp4(spec: ExpertsSpec, index: int, reader: PartReader, ranks: Ranks) -> Expert:
    def read(name: str, num_out: int, num_in: int) -> QuantisedWeight:
        if num_in % _BLOCK:
            raise reader.error(f"{name}_blocks", f"rows of {num_in} are not in runs of {_BLOCK}")
        shape = (spec.num_experts, num_out, num_in // _BLOCK)
        for suffix in ("blocks", "scales"):
            header = reader.header(f"{name}_{suffix}")
            if header is not None and header.dtype != "U8":
                raise reader.error(f"{name}_{suffix}", f"dtype {header.dtype} is not U8")
        blocks = _one(reader.read, f"{name}_blocks", (*shape, _BLOCK // 2), index)
        scales = _one(reader.read, f"{name}_scales", shape, index)
        if not scales.is_meta and bool((scales == _NO_NUMBER).any()):
            raise reader.error(f"{name}_scales", "holds what is no number")
        return fp4.mxfp4(blocks, scales)

    names = spec.names
    gate_up = read(names.fused_gate_up, 2 * spec.size, spec.num_in)
    down = read(names.fused_down, spec.num_in, spec.size)
    return _shared_out(spec, index, gate_up, down, reader, ranks)


def _one(read: Callable[..., Tensor], name: str, shape: tuple[int, ...], index: int) -> Tensor:
    """Of a tensor that holds all experts, one's part."""
    part = read(name, shape, (slice(index, index + 1),))
    return part.view(shape[1:])


def _shared_out(
    spec: ExpertsSpec,
    index: int,
    gate_up: Tensor | QuantisedWeight,
    down: Tensor | QuantisedWeight,
    reader: PartReader,
    ranks: Ranks,
) -> Expert:
    """This rank's share of a whole expert."""
    bias = down_bias = None
    if spec.has_bias:
        names, count = spec.names, spec.num_experts
        of_gate_up = (count, spec.num_up)
        bias = _one(reader.read_float, f"{names.fused_gate_up}_bias", of_gate_up, index)
        of_down = (count, spec.num_in)
        down_bias = _one(reader.read_float, f"{names.fused_down}_bias", of_down, index)
    own = ranks.share(spec.size, 1)
    if ranks.size > 1:
        down = down[:, own] if isinstance(down, Tensor) else down.part(_WHOLE, own)
    if isinstance(gate_up, Tensor):
        gate_up = _rows(gate_up, own, spec)
    else:
        gate_up = _small_rows(gate_up, own, spec)
    return Expert(
        (gate_up,),
        (down,),
        None if bias is None else _rows(bias, own, spec),
        None if ranks.rank else down_bias,
    )


def _small_rows(gate_up: QuantisedWeight, own: slice, spec: ExpertsSpec) -> QuantisedWeight:
    """As `_rows`."""
    num_own = own.stop - own.start
    num_rows = num_own * spec.num_up // spec.size
    if gate_up.is_meta:
        return gate_up.part(slice(0, num_rows), _WHOLE)
    index = _rows(torch.arange(gate_up.num_out, device=gate_up.codes.device), own, spec)
    return gate_up.take_rows(index)


def _rows(gate_up: Tensor, own: slice, spec: ExpertsSpec) -> Tensor:
    """The rows of gate and up that this rank has, one above the other."""
    num_own = own.stop - own.start
    if spec.num_up == spec.size:
        return gate_up if num_own == spec.size else gate_up[own]
    if gate_up.is_meta:
        # To join on paper loads torch's compiler.
        return gate_up.new_empty((2 * num_own, *gate_up.shape[1:]))
    if spec.alternates:
        return torch.cat((gate_up[::2][own], gate_up[1::2][own]))
    if num_own == spec.size:
        return gate_up
    return torch.cat((gate_up[: spec.size][own], gate_up[spec.size :][own]))
