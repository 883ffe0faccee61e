"""Drawing tokens in plain torch, from random bits that are a function of a key and a token id."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_NUM_CANDIDATES = 256
NOTHING_LEFT = -2
"""Drawn where every token is ruled out."""


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    key: Tensor,
) -> Tensor:
    """Draws one token per row; a pure function of each row → int64 [R].

    The logits are divided by the temperature. Of that distribution top-k keeps the k most likely
    tokens; top-p, of those, the fewest from the most likely on whose share of their sum reaches p;
    min-p those at least min_p times as likely as the most likely one. A token as likely as the last
    one kept is kept too. The most likely token always survives.

    Args:
        logits: float32 [R, vocab].
        temperature: float32 [R], positive.
        top_k: int64 [R]; 0 keeps all.
        top_p, min_p: float32 [R]; 1 and 0 keep all.
        key: int64 [R], the random bits of each row's draw.
    """
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature[:, None])
    lowest_kept = torch.log(min_p)
    limited = ((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1)
    rows = limited.nonzero().flatten()
    if rows.numel():
        limit = _lowest_kept(scaled[rows], top_k[rows], top_p[rows])
        lowest_kept[rows] = torch.maximum(lowest_kept[rows], limit)
    dropped = scaled < lowest_kept[:, None]
    # A race: token i arrives after an exponential time with rate p(i), and the first one wins.
    head_start = torch.log_(_exponential(key, logits.shape[1]))
    return scaled.sub_(head_start).masked_fill_(dropped, float("-inf")).argmax(-1)


def random_bits(key: Tensor, num_tokens: int) -> Tensor:
    """SplitMix64 streams: int64 [R, num_tokens], element t being output t of the stream key[r].

    Wrapping 64-bit arithmetic and logical shifts only, so every device gives the same bits.
    """
    counter = torch.arange(1, num_tokens + 1, device=key.device) * _GOLDEN
    bits = key[:, None] + counter
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        bits.bitwise_xor_(_shift_right(bits, shift)).mul_(multiplier)
    return bits.bitwise_xor_(_shift_right(bits, 31))


def _shift_right(bits: Tensor, shift: int) -> Tensor:
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _exponential(key: Tensor, num_tokens: int) -> Tensor:
    """Exponential variates with mean 1: float32 [R, num_tokens], finest near 0, where races end."""
    uniform = _shift_right(random_bits(key, num_tokens), 11).float().add_(0.5).mul_(2.0**-53)
    # Rounded to 1 it would make an infinite time, which loses even against nobody.
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


def _lowest_kept(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The value of the last token that top-k, then top-p keep: float32 [R].

    Most rows are settled by their most likely tokens; the others are sorted whole. Both ways add
    the same numbers in the same order.
    """
    vocab = scaled.shape[1]
    whole = scaled.exp().sum(-1, dtype=torch.float64)
    most = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    num_candidates = min(_NUM_CANDIDATES, vocab)
    values = scaled.topk(num_candidates, sorted=True).values
    result, settled = _settle(values, whole, most, top_p, vocab)
    rows = (~settled).nonzero().flatten()
    if rows.numel():
        values = scaled[rows].sort(-1, descending=True).values
        result[rows], _ = _settle(values, whole[rows], most[rows], top_p[rows], vocab)
    return result


def _settle(
    values: Tensor, whole: Tensor, most: Tensor, top_p: Tensor, vocab: int
) -> tuple[Tensor, Tensor]:
    """Applies the limits to the most likely tokens.

    Args:
        values: float32 [R, c], falling.
        whole: float64 [R], sum of exp over the vocabulary.
        most: int64 [R], how many tokens top-k leaves.

    Returns:
        The value of the last token kept, and whether c tokens were enough to know it.
    """
    num_values = values.shape[1]
    weights = values.double().exp()
    reached = weights.cumsum(-1)
    within = most.clamp(max=num_values)
    sum_of_most = reached.gather(1, within[:, None] - 1).squeeze(1)
    goal = top_p.double() * torch.where(most == vocab, whole, sum_of_most)
    needed = ((reached - weights) < goal[:, None]).sum(-1).clamp(min=1)
    needed = torch.where(top_p < 1, torch.minimum(needed, within), within)
    settled = (needed < num_values) | (most <= num_values)
    settled &= (most <= num_values) | (most == vocab)
    return values.gather(1, needed[:, None] - 1).squeeze(1), settled
