"""compressed-tensors' pack-quantized: whole numbers of 1 to 8 bits, as many as fit in a word.

weight_packed        int32 [out, in · bits / 32], numbers plus half their range
weight_scale         [out, groups]
weight_zero_point    int32 [out · bits / 32, groups], packed along the outputs in the same way
weight_shape         int64 [2]
weight_g_idx         int32 [in]: the group of each column, where they are out of order
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.shared.engine.quantised.bits import num_words, unpack_columns, unpack_rows
from baton.shared.engine.quantised.form import (
    TensorReader,
    check_scales,
    check_words,
    num_groups,
    read_scale,
    read_words,
)
from baton.shared.engine.quantised.scheme import Scheme
from baton.shared.engine.quantised.weight import QuantisedWeight


def holds(module: str, reader: TensorReader) -> bool:
    header = reader.header(f"{module}.weight_packed")
    return header is not None and header.dtype == "I32"


def read(
    module: str, shape: tuple[int, int], scheme: Scheme, reader: TensorReader
) -> QuantisedWeight:
    num_out, num_in = shape
    bits, name = scheme.num_bits, f"{module}.weight_packed"
    if scheme.kind != "int":
        raise reader.error(name, f"whole numbers where config.json says {scheme.numbers}")
    because = f"config.json makes the weight {list(shape)} of {bits} bits"
    words = read_words(reader, name, (num_out, num_words(num_in, bits)), "I32", because)
    _check_shape(module, shape, reader)
    scale_name = f"{module}.weight_scale"
    count = num_groups(reader, scale_name, scheme, num_in)
    scale = read_scale(reader, scale_name, "the weight is packed")
    check_scales(reader, scale_name, scale, 2**bits, is_signed=scheme.is_symmetric)
    found = tuple(scale.shape)
    if scheme.strategy == "tensor":
        if scale.numel() != 1:
            reason = f"shape {list(found)} is not [1]: strategy tensor of config.json"
            raise reader.error(scale_name, reason)
    elif found != (num_out, count) and (found, count, scheme.strategy) != ((1,), 1, None):
        expected = f"{[num_out, count]}: group_size {scheme.group_size} of config.json"
        raise reader.error(scale_name, f"shape {list(found)} is not {expected}")
    scale = scale.view(-1, count)
    packed_zero = None
    if not scheme.is_symmetric:
        packed_zero = read_words(
            reader,
            f"{module}.weight_zero_point",
            (num_words(num_out, bits), count),
            "I32",
            "config.json says that zeros are anywhere",
        )
    group_of = read_group_of(f"{module}.weight_g_idx", num_in, count, reader, scheme)
    if words.is_meta:
        return QuantisedWeight.on_paper(
            *shape,
            bits,
            count,
            scale=scale.dtype,
            num_scales=len(scale),
            zero=None if packed_zero is None else torch.int8,
            group_of=group_of,
        )
    middle = 2 ** (bits - 1)
    zero = None
    if packed_zero is not None:
        zero = (unpack_rows(packed_zero, bits, num_out).to(torch.int16) - middle).to(torch.int8)
    codes = (unpack_columns(words, bits, num_in).to(torch.int16) - middle).to(torch.int8)
    return QuantisedWeight(codes, scale, bits, zero=zero, group_of=group_of)


def read_group_of(
    name: str, num_in: int, count: int, reader: TensorReader, scheme: Scheme
) -> Tensor | None:
    """The group of each column, on paper too if anything depends on it; None: they are in order, or
    there is no such tensor."""
    if reader.header(name) is None:
        if scheme.order is None or count == 1:
            return None
        raise reader.error(name, f"missing tensor, though config.json says {scheme.order}")
    check_words(reader, name, (num_in,), "I32", f"rows are of {num_in}")
    group_of = reader.read_known(name, (num_in,)).long()
    if group_of.is_meta:
        return None
    if bool((group_of < 0).all()):
        # Written by tools that leave it empty.
        return None
    if int(group_of.min()) < 0 or int(group_of.max()) >= count:
        raise reader.error(name, f"names a group beside the {count} of the scales")
    sizes = group_of.bincount(minlength=count)
    if int(sizes.max()) > num_in // count:
        largest, most = int(sizes.argmax()), int(sizes.max())
        raise reader.error(name, f"group {largest} has {most} columns, not {num_in // count}")
    in_order = torch.arange(count, device=group_of.device).repeat_interleave(num_in // count)
    return None if torch.equal(group_of, in_order) else group_of


def _check_shape(module: str, shape: tuple[int, int], reader: TensorReader) -> None:
    name = f"{module}.weight_shape"
    header = reader.header(name)
    if header is None:
        return
    if header.dtype not in ("I64", "I32") or header.shape != (2,):
        raise reader.error(name, f"{header.dtype} {list(header.shape)} is no shape")
    stored = reader.read(name, (2,))
    if not stored.is_meta and stored.tolist() != list(shape):
        raise reader.error(name, f"{stored.tolist()} where config.json makes it {list(shape)}")
