"""In plain torch: drawing from the batch's state, keeping that state, and the sums of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.reference_sampling import NOTHING_LEFT, random_bits, sample

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
    back: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """See kernels.sampling.draw; `work` and `pdl` are not used."""
    if out is None:
        out = torch.empty(rows.shape, dtype=torch.int32, device=rows.device)
    most = logits.float().amax(-1)
    out.fill_(-1).masked_fill_((rows >= 0) & (most == float("-inf")), NOTHING_LEFT)
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
            position = context_lens[slot].long()
            if back is not None:
                position -= back[index].long()
            key = random_bits(stream[slot] + position * _GOLDEN, 1)[:, 0]
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
    num_slot_groups: int = 0,
    pdl: bool = False,
) -> None:
    """See kernels.batch_state.begin_step; `pdl` is not used."""
    for i, slot in enumerate(rows.tolist()):
        input_ids[i], positions[i], slots[:, i] = 0, 0, -1
        if slot < 0:
            continue
        position = int(context_lens[slot])
        input_ids[i], positions[i] = token_ids[slot], position
        slots[:, i] = _places(block_tables[:, slot], position, block_size)
        if num_slot_groups:
            slots[-num_slot_groups:, i] = block_tables[-num_slot_groups:, slot, 0].long()
        context_lens[slot] = position + 1


def begin_drafted_step_reference(
    rows: Tensor,
    token_ids: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    draft_ids: Tensor,
    num_drafts: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    token_rows: Tensor,
    back: Tensor,
    *,
    block_size: int,
    num_slot_groups: int = 0,
) -> None:
    """See kernels.drafts.begin_drafted_step."""
    width = token_rows.numel() // rows.numel()
    for row, slot in enumerate(rows.tolist()):
        count = int(num_drafts[slot]) if slot >= 0 else -1
        base = int(context_lens[slot]) if slot >= 0 else 0
        for j in range(width):
            i = row * width + j
            input_ids[i], positions[i], slots[:, i], token_rows[i], back[i] = 0, 0, -1, -1, 0
            if j <= count:
                input_ids[i] = token_ids[slot] if j == 0 else draft_ids[slot, j - 1]
                positions[i], token_rows[i], back[i] = base + j, slot, count - j
                slots[:, i] = _places(block_tables[:, slot], base + j, block_size)
                if num_slot_groups:
                    slots[-num_slot_groups:, i] = block_tables[-num_slot_groups:, slot, 0].long()
        if slot >= 0:
            context_lens[slot] = base + 1 + count


def accept_drafts_reference(
    rows: Tensor,
    tokens: Tensor,
    draft_ids: Tensor,
    num_drafts: Tensor,
    token_ids: Tensor,
    context_lens: Tensor,
    counts: Tensor,
) -> None:
    """See kernels.drafts.accept_drafts."""
    width = draft_ids.shape[1] + 1
    for row, slot in enumerate(rows.tolist()):
        counts[row] = 0
        if slot < 0:
            continue
        drawn, drafts = tokens[row * width :][:width].tolist(), draft_ids[slot].tolist()
        standing, count = 0, int(num_drafts[slot])
        while standing < count and drawn[standing] == drafts[standing]:
            standing += 1
        if drawn[standing] >= 0:
            token_ids[slot] = drawn[standing]
        context_lens[slot] -= count - standing
        counts[row] = standing + 1


def _places(tables: Tensor, position: int, block_size: int) -> Tensor:
    """tables [G, max_blocks] → [G], where each group keeps the token at a position."""
    index, offset = divmod(position, block_size)
    if index >= tables.shape[1]:
        return torch.full((len(tables),), -1, device=tables.device)
    return tables[:, index].long() * block_size + offset
