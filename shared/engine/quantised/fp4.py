"""Floats of four bits, two in a byte, with a scale for each run of 16 or 32.

weight_packed          uint8 [out, in / 2], the lower half of a byte first
weight_scale           NVFP4: float8 [out, in / 16]; MXFP4: uint8 [out, in / 32], exponents of
                       two plus 127
weight_global_scale    NVFP4: float32 [1], which divides the scales
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from baton.shared.engine.quantised.bits import nibbles
from baton.shared.engine.quantised.form import (
    TensorReader,
    check_finite,
    check_scales,
    num_groups,
    powers_of_two,
    read_exponents,
    read_scale,
    read_words,
)
from baton.shared.engine.quantised.scheme import Scheme
from baton.shared.engine.quantised.weight import QuantisedWeight

_TWICE = (0, 1, 2, 3, 4, 6, 8, 12)
"""The numbers times two, which are whole; those behind them are negative."""
LEVELS = (*_TWICE, *(-value for value in _TWICE))
_BITS = 5
"""Of these whole numbers."""
_NV_GROUP, _MX_GROUP = 16, 32
_GROUPS = {"nvfp4-pack-quantized": _NV_GROUP, "mxfp4-pack-quantized": _MX_GROUP}


def holds(module: str, reader: TensorReader) -> bool:
    header = reader.header(_packed_name(module, reader))
    return header is not None and header.dtype == "U8"


def read(
    module: str, shape: tuple[int, int], scheme: Scheme, reader: TensorReader
) -> QuantisedWeight:
    num_out, num_in = shape
    name, scale_name = _packed_name(module, reader), f"{module}.weight_scale"
    if scheme.numbers != "float4":
        raise reader.error(name, f"floats of 4 bits where config.json says {scheme.numbers}")
    if scheme.group_size not in (_NV_GROUP, _MX_GROUP):
        raise reader.error(name, f"group_size {scheme.group_size} is neither 16 nor 32")
    if scheme.form is not None and scheme.group_size != _GROUPS[scheme.form]:
        is_for = f"{_GROUPS[scheme.form]}, as format {scheme.form} has it"
        raise reader.error(name, f"group_size {scheme.group_size} is not {is_for}")
    because = f"config.json makes the weight {list(shape)} of 4 bits"
    packed = read_words(reader, name, (num_out, num_in // 2), "U8", because)
    of_groups = (num_out, num_groups(reader, scale_name, scheme, num_in))
    if scheme.group_size == _MX_GROUP:
        scale = read_exponents(reader, scale_name, of_groups, because)
    else:
        scale = _nv_scale(module, of_groups, because, reader)
    if packed.is_meta:
        paper = QuantisedWeight.on_paper(*shape, _BITS, of_groups[1])
        return replace(paper, levels=LEVELS)
    return QuantisedWeight(whole_numbers(packed), scale / 2, _BITS, levels=LEVELS)


def mxfp4(blocks: Tensor, exponents: Tensor) -> QuantisedWeight:
    """As gpt-oss has them: blocks uint8 [out, runs, 16], exponents of two plus 127 uint8 [out,
    runs], or on paper. Powers of two are kept in bfloat16, which holds each of them."""
    num_out, num_runs, _ = blocks.shape
    if blocks.is_meta:
        shape = num_out, num_runs * _MX_GROUP
        paper = QuantisedWeight.on_paper(*shape, _BITS, num_runs, scale=torch.bfloat16)
        return replace(paper, levels=LEVELS)
    scale = (powers_of_two(exponents) / 2).bfloat16()
    codes = whole_numbers(blocks).flatten(1)
    return QuantisedWeight(codes, scale, _BITS, levels=LEVELS)


def _packed_name(module: str, reader: TensorReader) -> str:
    name = f"{module}.weight_packed"
    return f"{module}.weight" if reader.header(name) is None else name


def whole_numbers(packed: Tensor) -> Tensor:
    """uint8 [..., n] → int8 [..., 2 n], twice the numbers."""
    values = torch.tensor(LEVELS, dtype=torch.int8, device=packed.device)
    return values[nibbles(packed).int()]


def _nv_scale(module: str, shape: tuple[int, int], because: str, reader: TensorReader) -> Tensor:
    name = f"{module}.weight_scale"
    multiplies = reader.header(f"{module}.weight_scale_2") is not None
    whole_name = f"{module}.weight_scale_2" if multiplies else f"{module}.weight_global_scale"
    scale = read_words(reader, name, shape, "F8_E4M3", because)
    whole = read_scale(reader, whole_name, because)
    if tuple(whole.shape) not in ((), (1,)):
        raise reader.error(whole_name, f"shape {list(whole.shape)} is not [1]")
    if scale.is_meta:
        return scale
    check_scales(reader, whole_name, whole, 1)
    check_scales(reader, name, scale.float(), 1)
    scale = scale.float() * whole.float() if multiplies else scale.float() / whole.float()
    check_finite(reader, name, scale)
    return scale
