"""Logprobs: how likely the model held tokens, from its own logits before anything changes them.

They are made of the rows that ask, and of no others. However many likeliest tokens a row asks for,
all that may be asked for are looked for: which of two that are equally likely comes first does not
depend on what the rest of the step asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.shared.kv.drawn import TokenLogprobs
from baton.shared.sampling import MOST_TOP_LOGPROBS

_MOST_AT_ONCE = 1 << 24
"""Logits of a prompt are computed for so many (token, word) pairs at a time."""
_FIXED_COLUMNS = 2
"""Before the likeliest ones: logprob and rank."""


def rows_at_once(vocab_size: int) -> int:
    """Tokens of a prompt whose logits are there at the same time: a few, however long it is."""
    return max(1, _MOST_AT_ONCE // vocab_size)


def log_probabilities(logits: Tensor) -> Tensor:
    """logits [R, vocab] → float32 [R, vocab], memory of its own."""
    return logits.float().log_softmax(-1)


def packed_logprobs(logprobs: Tensor, token_ids: Tensor) -> Tensor:
    """What is told of one token in each row, as one tensor that is copied at once.

    Args:
        logprobs: float32 [R, vocab].
        token_ids: int32 or int64 [R]; below zero where there is none, of which then nothing is
            right.

    Returns:
        int32 [R, columns]: logprob and rank, ids and logprobs of the likeliest tokens; floats as
        their bits.
    """
    own = logprobs.gather(1, token_ids.long().clamp_min(0).unsqueeze(1))
    ranks = (logprobs > own).sum(1, keepdim=True, dtype=torch.int32) + 1
    top, top_ids = logprobs.topk(min(MOST_TOP_LOGPROBS, logprobs.shape[1]))
    return torch.cat((own.view(torch.int32), ranks, top_ids.int(), top.view(torch.int32)), 1)


def unpacked_logprobs(
    packed: npt.NDArray[np.int32], num_top: Sequence[int]
) -> list[TokenLogprobs | None]:
    """packed: as `packed_logprobs` gives it. num_top: [R], how many of the likeliest each row asks
    for. None where the logits were not numbers."""
    ranks = packed[:, 1].tolist()
    most = (packed.shape[1] - _FIXED_COLUMNS) // 2
    told = min(max(num_top, default=0), most)
    floats = packed.view(np.float32)
    own = floats[:, 0].tolist()
    ids = packed[:, _FIXED_COLUMNS : _FIXED_COLUMNS + told].tolist()
    top = floats[:, _FIXED_COLUMNS + most : _FIXED_COLUMNS + most + told].tolist()
    return [
        TokenLogprobs(own[row], ranks[row], tuple(ids[row][:num]), tuple(top[row][:num]))
        if own[row] == own[row]
        else None
        for row, num in enumerate(num_top)
    ]
