"""8-bit numbers as they are, with scales beside them.

weight                               int8 or float8 [out, in]
weight_scale, weight_scale_inv       one, [out] or [out, 1], [out, groups] of equal runs, or
                                     [out / rows, in / columns] of blocks; despite its name the
                                     latter is multiplied
weight_zero_point                    int8, as the scales
input_scale, activation_scale        of activations, one for all
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from baton.kernels.reference_scaled import InputScheme
from baton.shared.engine.quantised.form import TensorReader, check_finite, read_scale
from baton.shared.engine.quantised.scheme import Scheme
from baton.shared.engine.quantised.weight import QuantisedWeight
from baton.shared.engine.weight_headers import FLOATS

_NUMBERS = {"I8": "int8", "F8_E4M3": "float8"}
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
    scale, group_of = _placed(_read_scale(scale_name, reader), scale_name, shape, scheme, reader)
    zero = None
    if not scheme.is_symmetric:
        zero_name = f"{module}.weight_zero_point"
        zero = _read_zero(zero_name, reader)
        zero, _ = _placed(zero, zero_name, shape, scheme, reader)
    inputs = _read_inputs(module, scheme, reader)
    if codes.is_meta:
        paper = QuantisedWeight.on_paper(*shape, 8, scale.shape[-1], codes.dtype)
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
    if not scale.is_meta:
        scale = scale.float()
        check_finite(reader, name, scale)
    return scale


def _read_zero(name: str, reader: TensorReader) -> Tensor:
    header = reader.header(name)
    if header is None or header.dtype not in ("I8", *FLOATS):
        found = "missing tensor" if header is None else f"dtype {header.dtype} is not I8"
        raise reader.error(name, f"{found}, though config.json says that zeros are anywhere")
    return reader.read(name, header.shape)


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

    if scheme.block is not None and of_groups.dim() == 2:
        rows, columns = scheme.block
        if found != (-(-num_out // rows), -(-num_in // columns)):
            raise misfit(f" in blocks of {rows} x {columns}")
        if of_groups.is_meta:
            return of_groups, None
        group_of = None
        if num_in % columns:
            group_of = torch.arange(num_in, device=of_groups.device) // columns
        return of_groups.repeat_interleave(rows, 0)[:num_out], group_of
    if of_groups.numel() == 1 and of_groups.dim() <= 1:
        return of_groups.reshape(1, 1), None
    if of_groups.dim() != 2 or found[0] != num_out or not found[1] or num_in % found[1]:
        raise misfit("")
    if scheme.group_size is not None and found[1] > 1:
        size = num_in // found[1]
        if size != scheme.group_size:
            raise misfit(f" in groups of {scheme.group_size}, as config.json has it")
    return of_groups, None
