"""Tokens that must not be drawn, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = -1e30
"""A token that may be drawn is never less likely: where all of them were banned by something else,
one of them is drawn all the same."""


def apply_token_masks(logits: Tensor, mask_rows: Tensor, masks: Tensor) -> None:
    """Changes the logits of tokens that must not be drawn to −inf, of the others to `LEAST` at
    least. What is no number stays so.

    Args:
        logits: float32 [R, vocab].
        mask_rows: int64 [R], which of the masks; −1: none.
        masks: int32 [M, ≥ vocab / 32]: bit t % 32 of word t // 32 lets token t be drawn.
    """
    rows = (mask_rows >= 0).nonzero().flatten()
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    allowed = (masks[mask_rows[rows]][:, :, None] >> bits) & 1
    allowed = allowed.flatten(1)[:, : logits.shape[1]].bool()
    kept = logits[rows].clamp_(min=LEAST)
    logits[rows] = kept.masked_fill_(~allowed & ~kept.isnan(), float("-inf"))
