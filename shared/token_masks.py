"""Masks of tokens, as whoever makes, hands along or applies them has them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TokenMasks = npt.NDArray[np.uint32]
"""[draws, words]: bit t % 32 of word t // 32 says whether token t may be drawn."""


def num_mask_words(vocab_size: int) -> int:
    """Of one mask."""
    return -(-vocab_size // 32)
