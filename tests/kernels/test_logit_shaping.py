"""Penalties, biases and bans of the kernel: those of plain torch, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from baton.kernels import reference_logit_shaping as reference
from baton.kernels.logit_shaping import (
    TOKEN_BITS,
    Counting,
    Guesses,
    ShapingColumns,
    shape_logits,
)
from baton.kernels.reference_logit_shaping import BANNED, FINAL, PROMPTED
from baton.kernels.sampling import draw
from baton.shared.kv.drawn import NOTHING_LEFT

SLOTS, DRAFTS, MOST = 7, 3, 200
POSITION = 40


@dataclass
class Asked:
    columns: ShapingColumns
    context_lens: Tensor
    guesses: Guesses

    def of_row(self, logits: Tensor, slot: int, num_behind: int, num_before: int) -> Tensor:
        """What the reference makes of a row."""
        columns, counting = self.columns, self.columns.counting
        row = logits.float().cpu().clone()
        if slot < 0 or not counting.is_shaped[slot]:
            return row
        marks = counting.marks[slot].cpu().clone()
        for draft in self.guesses.draft_ids[slot, :num_before].tolist():
            marks[draft] += 1
        count = int(columns.num_biases[slot])
        bans = columns.bans[slot, : int(columns.num_bans[slot])].tolist()
        reference.shape_logits(
            row,
            marks,
            presence=float(columns.presence[slot]),
            frequency=float(columns.frequency[slot]),
            repetition=float(columns.repetition[slot]),
            biases=(columns.bias_tokens[slot, :count].cpu(), columns.biases[slot, :count].cpu()),
            banned=[ban % 2**TOKEN_BITS for ban in bans if ban >> TOKEN_BITS == num_before],
            may_end=int(self.context_lens[slot]) - num_behind >= int(columns.may_end_at[slot]),
        )
        return row


def asked(vocab: int, device: torch.device, seed: int = 0) -> Asked:
    """Of slots with everything, with each alone, and with nothing."""
    generator = torch.Generator().manual_seed(seed)

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    counts = random(0, 4, SLOTS, vocab) * (random(0, 3, SLOTS, vocab) == 0)
    marks = counts.to(torch.int32)
    for bit in (PROMPTED, BANNED, FINAL):
        marks |= (random(0, 4, SLOTS, vocab) == 0).int() * bit
    num_biases = min(MOST, vocab)
    bias_tokens = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(SLOTS)])
    num_bans = min(MOST, vocab)
    bans = random(0, vocab, SLOTS, MOST) + (random(0, 1 + DRAFTS, SLOTS, MOST) << TOKEN_BITS)
    padding = (0, MOST - num_biases)

    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    def whole(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    # By slot: all, nothing, penalties, repetition below 1, biases, bans, marks alone.
    columns = ShapingColumns(
        Counting(
            marks.to(device), whole(1, 0, 1, 1, 1, 1, 1), torch.zeros_like(whole(*[0] * SLOTS))
        ),
        presence=column(0.7, 1, -0.3, 0, 0, 0, 0),
        frequency=column(0.37, 1, 1.9, 0, 0, 0, 0),
        repetition=column(1.3, 2, 1, 0.6, 1, 1, 1),
        may_end_at=whole(POSITION, POSITION, 0, 0, POSITION + 1, 0, POSITION - 1),
        num_biases=whole(num_biases, 2, 0, 0, 3 % (vocab + 1), 0, 0),
        bias_tokens=torch.nn.functional.pad(bias_tokens[:, :MOST], padding).int().to(device),
        biases=(torch.randn(SLOTS, MOST, generator=generator) * 3).to(device),
        num_bans=whole(num_bans, 2, 0, 0, 0, 5, 0),
        bans=bans.to(device),
    )
    return Asked(
        columns,
        torch.full((SLOTS,), POSITION, dtype=torch.int32, device=device),
        Guesses(random(0, vocab, SLOTS, DRAFTS).to(device), whole(3, 2, 0, 1, 3, 3, 2), num_rows=0),
    )


def logits_of(num_rows: int, vocab: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A view of wider rows."""
    wide = torch.randn(num_rows, vocab + 5, generator=torch.Generator().manual_seed(vocab)) * 4
    return wide.to(device, dtype)[:, :vocab]


@pytest.mark.parametrize("vocab", [1, 17, 333, 2500])
def test_rows_are_those_of_the_reference(
    vocab: int, device: torch.device, dtype: torch.dtype
) -> None:
    what = asked(vocab, device)
    rows = [4, 0, -1, 1, 6, 2, 5, 3]
    logits = logits_of(len(rows), vocab, device, dtype)
    before = logits.clone()
    in_place = dtype == torch.float32
    out = logits if in_place else torch.full((len(rows) + 2, vocab), 7.5, device=device)
    shape_logits(
        logits,
        torch.tensor(rows, dtype=torch.int32, device=device),
        what.context_lens,
        what.columns,
        out,
    )
    assert in_place or torch.equal(logits, before)
    for row, slot in enumerate(rows):
        expected = what.of_row(before[row], slot, 0, 0)
        if slot in (-1, 1) and not in_place:
            expected = torch.full((vocab,), 7.5)
        assert torch.equal(out[row].cpu(), expected), slot


def test_guesses_before_a_token_count(device: torch.device) -> None:
    """Of decode rows, the first ones; a chunk's row has none, whatever its slot has left over."""
    vocab = 60
    what = asked(vocab, device, seed=1)
    what.guesses.draft_ids[0] = 5
    places = [(slot, j) for slot in (0, 4, 3, 1) for j in range(1 + DRAFTS)]
    rows, back = [], []
    for slot, j in places:
        num_drafts = int(what.guesses.num_drafts[slot])
        rows.append(slot if j <= num_drafts else -1)
        back.append(num_drafts - j if j <= num_drafts else 0)
    guesses = what.guesses._replace(num_rows=len(rows))
    # Two chunks behind them.
    rows += [5, 6]
    back += [0, 0]
    logits = logits_of(len(rows), vocab, device, torch.float32)
    before = logits.clone()
    shape_logits(
        logits,
        torch.tensor(rows, dtype=torch.int32, device=device),
        what.context_lens,
        what.columns,
        logits,
        back=torch.tensor(back, dtype=torch.int32, device=device),
        guesses=guesses,
    )
    for row, (slot, num_behind) in enumerate(zip(rows, back, strict=True)):
        num_before = places[row][1] if row < guesses.num_rows else 0
        expected = what.of_row(before[row], slot, num_behind, num_before)
        assert torch.equal(logits[row].cpu(), expected), (slot, num_behind)


def test_what_is_no_number_stays_so(device: torch.device) -> None:
    what = asked(30, device)
    logits = logits_of(1, 30, device, torch.float32)
    logits[0, 3:20] = float("nan")
    logits[0, 21] = float("inf")
    marks = what.columns.counting.marks
    marks[0, 3:22] = BANNED
    marks[0, 21] = 1
    before = logits.clone()
    rows = torch.zeros(1, dtype=torch.int32, device=device)
    shape_logits(logits, rows, what.context_lens, what.columns, logits)
    expected = what.of_row(before[0], 0, 0, 0)
    assert expected[3:20].isnan().all() and float(expected[21]) == float("inf")
    assert torch.equal(logits[0].isnan().cpu(), expected.isnan())
    assert torch.equal(logits[0].nan_to_num(-1.0).cpu(), expected.nan_to_num(-1.0))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("penalty", [2.0**-126, 2.0**127])
def test_extreme_penalties_stay_finite(penalty: float, device: torch.device) -> None:
    what = asked(40, device)
    what.columns.repetition.fill_(penalty)
    what.columns.counting.marks.bitwise_and_(~(BANNED | FINAL))
    logits = logits_of(1, 40, device, torch.float32)
    before = logits.clone()
    rows = torch.full((1,), 3, dtype=torch.int32, device=device)
    shape_logits(logits, rows, what.context_lens, what.columns, logits)
    assert logits.isfinite().all()
    assert torch.equal(logits[0].cpu(), what.of_row(before[0], 3, 0, 0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_changed_are_drawn_from(device: torch.device, temperature: float) -> None:
    """16 bits are too coarse for penalties: changed rows stand beside the others."""
    logits = torch.zeros(4, 90, dtype=torch.float16, device=device)
    logits[:, :2] = 20.0
    changed = torch.full((5, 90), float("-inf"), device=device)
    changed[:, 70] = 1e-3
    changed[:, 80] = 2e-3
    changed[3] = float("-inf")

    def whole(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def column(value: float) -> Tensor:
        return torch.full((6,), value, device=device)

    tokens = draw(
        logits,
        whole(5, 0, -1, 2),
        whole(9, 9, 9, 9, 9, 9),
        column(temperature),
        whole(0, 0, 0, 0, 0, 3),
        column(0.9),
        column(0.0),
        torch.arange(6, device=device),
        whole(*[-7] * 6),
        changed=changed,
        is_changed=whole(0, 1, 1, 1, 1, 1),
    ).tolist()
    assert tokens[0] in ((80,) if temperature == 0 else (70, 80))
    assert tokens[1] in (0, 1)
    assert tokens[2:] == [-1, NOTHING_LEFT]
