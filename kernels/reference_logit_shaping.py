"""What a request says of single tokens, applied to a row of logits before anything is drawn.

What a token has been to the sequence so far is one int32, its mark:

    bits 0 … 23   how often the answer has it
    PROMPTED      the prompt has it; known only where repetition counts
    BANNED        it is never drawn
    FINAL         it would end the answer
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COUNT = (1 << 24) - 1
PROMPTED = 1 << 24
BANNED = 1 << 25
FINAL = 1 << 26


def shape_logits(
    logits: Tensor,
    marks: Tensor,
    *,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
    biases: tuple[Tensor, Tensor] | None = None,
    banned: Sequence[int] = (),
    may_end: bool = True,
    has_bans: bool = True,
) -> None:
    """Changes a row in place: biases, then penalties, then bans. A function of the row alone.

    Repetition divides what is above zero and multiplies the rest; what overflows by that stays
    finite. A NaN stays one, banned or not: who draws finds it.

    Args:
        logits: float32 [vocab].
        marks: int32 [vocab].
        biases: int64 [n], which tokens, and float32 [n], what is added.
        banned: tokens that are not drawn here, beside those that are marked so.
        may_end: else tokens that would end the answer are not drawn.
        has_bans: False: no token is marked BANNED or FINAL.
    """
    if biases is not None:
        tokens, numbers = biases
        logits[tokens] += numbers
    if repetition != 1:
        seen = (marks & (COUNT | PROMPTED)).nonzero().squeeze(1)
        before = logits[seen]
        after = torch.where(before > 0, before / repetition, before * repetition)
        largest = torch.finfo(torch.float32).max
        logits[seen] = torch.where(before.isfinite(), after.clamp(-largest, largest), before)
    if presence or frequency:
        emitted = (marks & COUNT).nonzero().squeeze(1)
        counts = (marks[emitted] & COUNT).float()
        logits[emitted] = logits[emitted] - counts * frequency - presence
    if not has_bans and not banned:
        return
    out = (marks & (BANNED if may_end else BANNED | FINAL)) != 0
    if banned:
        out[list(banned)] = True
    logits.masked_fill_(out & ~logits.isnan(), float("-inf"))
