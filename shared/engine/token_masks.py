"""Which tokens a draw may give, as a mask of bits: applied to logits behind all that changes them
and before temperature and filters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TokenMasks = npt.NDArray[np.uint32]
"""[draws, words]: bit t % 32 of word t // 32 says whether token t may be drawn."""

LEAST = -1e30
"""A token that may be drawn is never less likely: where all of them were banned by something else,
one of them is drawn all the same."""


def apply_masks(logits: Tensor, rows: Sequence[int], masks: TokenMasks) -> None:
    """Changes `logits`.

    Args:
        logits: float32 [R, vocab].
        rows: which of them each mask is for; [draws], distinct.
    """
    if not rows:
        return
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little", count=logits.shape[1])
    allowed = torch.from_numpy(bits).to(logits.device).bool()
    places = torch.tensor(rows, device=logits.device)
    kept = logits[places].clamp_(min=LEAST)
    logits[places] = kept.masked_fill_(~allowed, float("-inf"))
