"""AWQ's files: whole numbers of four bits packed along the outputs, out of order in each word.

qweight    int32 [in, out / 8]
qzeros     int32 [groups, out / 8]
scales     [groups, out]
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.shared.engine.quantised.bits import num_words, unpack_columns
from baton.shared.engine.quantised.form import TensorReader, num_groups, read_words
from baton.shared.engine.quantised.gptq import read_scales
from baton.shared.engine.quantised.scheme import Scheme
from baton.shared.engine.quantised.weight import QuantisedWeight

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the numbers of eight outputs are."""


def read(
    module: str, shape: tuple[int, int], scheme: Scheme, reader: TensorReader
) -> QuantisedWeight:
    num_out, num_in = shape
    name, scale_name = f"{module}.qweight", f"{module}.scales"
    if num_out % len(_PLACES):
        raise reader.error(name, f"{num_out} outputs do not fill words of {len(_PLACES)}")
    because = f"config.json makes the weight {list(shape)} of 4 bits"
    num_columns = num_words(num_out, scheme.num_bits)
    words = read_words(reader, name, (num_in, num_columns), "I32", because)
    count = num_groups(reader, scale_name, scheme, num_in)
    scale = read_scales(scale_name, (count, num_out), scheme, reader)
    zeros = read_words(reader, f"{module}.qzeros", (count, num_columns), "I32", because)
    if words.is_meta:
        return QuantisedWeight.on_paper(
            *shape, 4, count, torch.uint8, scale=scale.dtype, zero=torch.uint8
        )
    codes, zero = _in_order(words, num_out).t(), _in_order(zeros, num_out).t()
    return QuantisedWeight(codes.contiguous(), scale.t().contiguous(), 4, zero=zero.contiguous())


def _in_order(words: Tensor, num_out: int) -> Tensor:
    numbers = unpack_columns(words, 4, num_out).view(len(words), -1, len(_PLACES))
    places = torch.tensor(_PLACES, device=words.device)
    return numbers.index_select(2, places).view(len(words), num_out)
