"""Tokens that must not be drawn: bits over the vocabulary, applied to logits in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.reference_masks import LEAST

_BLOCK = 1024
_PROGRAMS = 8  # of a row
_LEAST_OF = {torch.float16: -6e4}
"""In place of `LEAST` by dtype, where that is no number of it."""


def apply_token_masks(logits: Tensor, mask_rows: Tensor, masks: Tensor) -> None:
    """As reference_masks.apply_token_masks. Rows without a mask cost a look at `mask_rows`.

    Args:
        logits: float32, bfloat16 or float16 [R, vocab], changed; tokens of a row adjacent.
        mask_rows: int32 [R], which of the masks; −1: none.
        masks: int32 [M, ≥ vocab / 32], contiguous: bit t % 32 of word t // 32 lets token t be
            drawn.
    """
    num_rows, vocab = logits.shape
    if logits.stride(1) != 1 or masks.shape[1] * 32 < vocab:
        raise ValueError("logits must have adjacent tokens, and masks a bit for each")
    if num_rows == 0:
        return
    _apply_token_masks[(num_rows, _PROGRAMS)](
        logits,
        mask_rows,
        masks,
        vocab,
        logits.stride(0),
        masks.stride(0),
        LEAST=_LEAST_OF.get(logits.dtype, LEAST),
        BLOCK=_BLOCK,
        PROGRAMS=_PROGRAMS,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["vocab"])
def _apply_token_masks(
    logits,
    mask_rows,
    masks,
    vocab,
    stride,
    mask_stride,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    row = tl.program_id(0)
    mask = tl.load(mask_rows + row)
    if mask >= 0:
        line = logits + row.to(tl.int64) * stride
        bits = masks + mask.to(tl.int64) * mask_stride
        for start in range(tl.program_id(1) * BLOCK, vocab, PROGRAMS * BLOCK):
            token = start + tl.arange(0, BLOCK)
            exists = token < vocab
            word = tl.load(bits + token // 32, mask=exists, other=0)
            allowed = ((word >> (token % 32)) & 1) != 0
            value = tl.load(line + token, mask=exists, other=0.0).to(tl.float32)
            # Not a maximum: what is no number shall be seen.
            value = tl.where(value < LEAST, LEAST, value)
            value = tl.where(allowed | (value != value), value, float("-inf"))
            tl.store(line + token, value.to(logits.dtype.element_ty), mask=exists)
