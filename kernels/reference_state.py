"""In plain torch: drawing from the batch's state, keeping that state, and the sums of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.reference_sampling import random_bits, sample

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def draw_reference(
    logits: Tensor,
    rows: Tensor,
    context_lens: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    stream: Tensor,
    token_ids: Tensor,
    *,
    out: Tensor | None = None,
    work: object = None,
    pdl: bool = False,
) -> Tensor:
    """See kernels.sampling.draw; `work` and `pdl` are not used."""
    if out is None:
        out = torch.empty(rows.shape, dtype=torch.int32, device=rows.device)
    out.fill_(-1)
    most = logits.float().amax(-1)
    usable = (rows >= 0) & most.isfinite()  # amax of a row with a NaN is a NaN
    for greedy in (True, False):
        index = (usable & ((temperature[rows.clamp(min=0)] <= 0) == greedy)).nonzero().flatten()
        if not index.numel():
            continue
        slot = rows[index]
        chosen = logits[index].float()
        if greedy:
            # argmax does not promise the first of equals.
            equal = chosen == most[index, None]
            tokens = equal.int().cumsum(-1).eq(0).sum(-1)
        else:
            # Element 0 of the stream from s is mix(s + GOLDEN).
            key = random_bits(stream[slot] + context_lens[slot].long() * _GOLDEN, 1)[:, 0]
            limits = (temperature[slot], top_k[slot].long(), top_p[slot], min_p[slot])
            tokens = sample(chosen, *limits, key)
        out[index] = tokens.int()
        token_ids[slot] = tokens.int()
    return out


def block_sums_reference(words: Tensor, block_ids: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See kernels.block_digest.block_sums."""
    zero = torch.zeros(1, dtype=torch.int64, device=words.device)
    weights = random_bits(zero, words.shape[2])[0] | 1
    sums = (words[block_ids].long() * weights).sum(-1)
    return sums if out is None else out.copy_(sums)


def scatter_reference(state: Tensor, updates: Tensor) -> None:
    """See kernels.batch_state.scatter."""
    offsets, values = updates[:, updates[0] >= 0]
    state[offsets.long()] = values


def begin_step_reference(
    rows: Tensor,
    token_ids: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    block_size: int,
    pdl: bool = False,
) -> None:
    """See kernels.batch_state.begin_step; `pdl` is not used."""
    for i, slot in enumerate(rows.tolist()):
        input_ids[i], positions[i], slots[i] = 0, 0, -1
        if slot < 0:
            continue
        position = int(context_lens[slot])
        page, offset = divmod(position, block_size)
        input_ids[i], positions[i] = token_ids[slot], position
        if page < block_tables.shape[1]:
            slots[i] = int(block_tables[slot, page]) * block_size + offset
        context_lens[slot] = position + 1
