"""8-bit numbers as they are, with scales beside them.

weight                               int8 or float8 [out, in]
weight_scale, weight_scale_inv       one, [out, 1], [out, groups] of equal runs, or
                                     [out / rows, in / columns] of blocks; despite its name the
                                     latter is multiplied
weight_zero_point                    int8, as the scales
weight_g_idx                         int32 [in]: the group of each column, where they are out of
                                     order
input_scale, activation_scale        of activations, one for all
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from baton.kernels.reference_scaled import InputScheme
from baton.shared.engine.quantised.form import (
    TensorReader,
    check_finite,
    check_scales,
    num_groups,
    read_scale,
)
from baton.shared.engine.quantised.packed import read_group_of
from baton.shared.engine.quantised.scheme import Scheme
from baton.shared.engine.quantised.weight import QuantisedWeight
from baton.shared.engine.weight_headers import FLOATS

_NUMBERS = {"I8": "int8", "F8_E4M3": "float8"}
_LARGEST = {"I8": 255.0, "F8_E4M3": 448.0}
_FEWEST = -128
"""Of zeros; the most is 127."""
_SCALES = ("weight_scale", "weight_scale_inv")
_INPUT_SCALES = ("input_scale", "activation_scale")
_BECAUSE = "the weight is of 8 bits"


def holds(module: str, reader: TensorReader) -> bool:
    header = reader.header(f"{module}.weight")
    return header is not None and header.dtype in _NUMBERS


def read(
    module: str, shape: tuple[int, int], scheme: Scheme, reader: TensorReader
) -> QuantisedWeight:
    name = f"{module}.weight"
    header = reader.header(name)
    assert header is not None
    if _NUMBERS[header.dtype] != scheme.numbers:
        found = f"dtype {header.dtype} where config.json's quantization_config says"
        raise reader.error(name, f"{found} {scheme.numbers}")
    codes = reader.read(name, shape)
    by_row = [suffix for suffix in _SCALES if reader.header(f"{module}.{suffix}") is not None]
    scale_name = f"{module}.{(by_row or _SCALES)[0]}"
    stored = _read_scale(scale_name, reader)
    is_signed = scheme.kind == "int" and scheme.is_symmetric
    check_scales(reader, scale_name, stored, _LARGEST[header.dtype], is_signed=is_signed)
    scale, group_of = _placed(stored, scale_name, shape, scheme, reader)
    if scheme.block is None:
        count = scale.shape[-1]
        group_of = read_group_of(f"{module}.weight_g_idx", shape[1], count, reader, scheme)
    zero = None
    if not scheme.is_symmetric:
        zero_name = f"{module}.weight_zero_point"
        zero = _read_zero(zero_name, reader)
        zero, _ = _placed(zero, zero_name, shape, scheme, reader)
    inputs = _read_inputs(module, scheme, reader)
    if codes.is_meta:
        is_one = scale.numel() == 1
        count = 1 if is_one else scale.shape[-1]
        paper = QuantisedWeight.on_paper(
            *shape,
            8,
            count,
            codes.dtype,
            scale=scale.dtype,
            num_scales=1 if is_one else None,
            zero=None if zero is None else zero.dtype,
            group_of=group_of,
        )
        return replace(paper, inputs=inputs)
    if header.dtype == "F8_E4M3" and bool(codes.isnan().any()):
        raise reader.error(name, "holds what is no number")
    return QuantisedWeight(codes, scale, 8, zero=zero, group_of=group_of, inputs=inputs)


def _read_inputs(module: str, scheme: Scheme, reader: TensorReader) -> InputScheme | None:
    """How the layer's inputs are made small; None: they are not, here."""
    inputs = scheme.inputs
    if inputs is None or not reader.quantises_inputs:
        return None
    scale = None
    if inputs.is_static:
        names = [f"{module}.{suffix}" for suffix in _INPUT_SCALES]
        name = next((each for each in names if reader.header(each) is not None), names[0])
        scale = read_scale(reader, name, "config.json says that activations have a static scale")
        if scale.numel() != 1:
            raise reader.error(name, f"shape {list(scale.shape)} is not that of one number")
        if not scale.is_meta and not bool(scale > 0):
            raise reader.error(name, f"{scale.item()} is no scale")
        scale = scale.float().reshape(1)
    dtype = torch.float8_e4m3fn if inputs.kind == "float" else torch.int8
    return InputScheme(dtype, inputs.group_size or 0, scale)


def _read_scale(name: str, reader: TensorReader) -> Tensor:
    header = reader.header(name)
    if header is None or header.dtype != "F8_E8M0":
        return read_scale(reader, name, _BECAUSE)
    scale = reader.read(name, header.shape)
    return torch.empty_like(scale, dtype=torch.float32) if scale.is_meta else scale.float()


def _read_zero(name: str, reader: TensorReader) -> Tensor:
    header = reader.header(name)
    if header is None or header.dtype not in ("I8", *FLOATS):
        found = "missing tensor" if header is None else f"dtype {header.dtype} is not I8"
        raise reader.error(name, f"{found}, though config.json says that zeros are anywhere")
    zero = reader.read(name, header.shape)
    if zero.is_meta or not zero.dtype.is_floating_point:
        return zero
    check_finite(reader, name, zero)
    least, most = float(zero.min()), float(zero.max())
    if least < _FEWEST or most >= -_FEWEST or bool((zero != zero.round()).any()):
        raise reader.error(name, f"{least:g} to {most:g} are no zeros of int8")
    return zero


def _placed(
    of_groups: Tensor, name: str, shape: tuple[int, int], scheme: Scheme, reader: TensorReader
) -> tuple[Tensor, Tensor | None]:
    """→ [out or 1, groups], and the group of each column where these are no equal runs."""
    num_out, num_in = shape
    found = tuple(of_groups.shape)

    def misfit(expected: str) -> Exception:
        return reader.error(
            name, f"shape {list(found)} does not fit a weight of {list(shape)}{expected}"
        )

    if scheme.block is not None:
        rows, columns = scheme.block
        if found != (-(-num_out // rows), -(-num_in // columns)):
            raise misfit(f" in blocks of {rows} x {columns}")
        group_of = None
        if num_in % columns:
            device = "cpu" if of_groups.is_meta else of_groups.device
            group_of = torch.arange(num_in, device=device) // columns
        if of_groups.is_meta:
            return of_groups, group_of
        return of_groups.repeat_interleave(rows, 0)[:num_out], group_of
    if found in ((), (1,)) and scheme.strategy in (None, "tensor"):
        return of_groups.reshape(1, 1), None
    if scheme.strategy == "tensor":
        if found != (1, 1):
            raise misfit(" with one scale: strategy tensor of config.json")
        return of_groups, None
    count = num_groups(reader, name, scheme, num_in)
    is_said = scheme.strategy is not None or scheme.group_size is not None
    if not is_said and len(found) == 2 and found[1] and not num_in % found[1]:
        count = found[1]
    if found != (num_out, count):
        told = f"strategy {scheme.strategy}, group_size {scheme.group_size} of config.json"
        raise misfit(f", of which {[num_out, count]} does: {told}")
    return of_groups, None
