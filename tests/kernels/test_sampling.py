"""Drawn tokens equal those of plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from baton.kernels.reference_sampling import random_bits
from baton.kernels.reference_state import draw_reference
from baton.kernels.sampling import (
    MAX_VOCAB,
    DrawConfig,
    SamplingScratch,
    draw,
    largest_weight,
    make_sampling_scratch,
)
from baton.shared.engine.sampler import draw_key, draw_stream

# Many parts, searches over more tokens than fit, blocks that end before the row.
_SMALL = DrawConfig(64, 32, 64, 32, 2, room=48, end_block=32, programs=12)


@dataclass
class _Batch:
    logits: Tensor
    rows: Tensor
    context_lens: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    stream: Tensor
    token_ids: Tensor

    def draw(self, config: DrawConfig | None = None, work: SamplingScratch | None = None) -> Tensor:
        return draw(**vars(self), config=config, work=work)

    def check(self, config: DrawConfig | None = None) -> Tensor:
        """Draws with both; returns the tokens, which are equal."""
        reference = replace(self, token_ids=self.token_ids.clone())
        expected = draw_reference(**vars(reference))
        actual = self.draw(config)
        assert actual.tolist() == expected.tolist()
        assert torch.equal(self.token_ids, reference.token_ids)
        return actual


def _batch(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> _Batch:
    """Every row with the same parameters; slots are more than rows, and in no order."""
    num_rows, device = len(logits), logits.device
    num_slots = num_rows + 3

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((num_slots,), value, dtype=dtype, device=device)

    return _Batch(
        logits=logits,
        rows=torch.randperm(num_slots)[:num_rows].to(device, torch.int32),
        context_lens=torch.randint(0, 9000, (num_slots,), dtype=torch.int32).to(device),
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.float32),
        min_p=column(min_p, torch.float32),
        stream=torch.randint(-(2**63), 2**63 - 1, (num_slots,)).to(device),
        token_ids=column(-7, torch.int32),
    )


def _logits(num_rows: int, vocab: int, device: torch.device, scale: float = 3.0) -> Tensor:
    """float32 [R, vocab], a view of wider rows whose other values are NaN."""
    wide = torch.full((num_rows, vocab + 5), float("nan"))
    wide[:, :vocab] = torch.randn(num_rows, vocab) * scale
    return wide.to(device)[:, :vocab]


@pytest.mark.parametrize("config", [None, _SMALL])
@pytest.mark.parametrize("vocab", [1, 2, 17, 333])
def test_random_parameters(device: torch.device, vocab: int, config: DrawConfig | None) -> None:
    batch = _batch(_logits(8, vocab, device))
    slots = batch.rows.long()
    # Row by row: nothing limits; top-k; top-p; min-p; all; the first again, flat; greedy; padding.
    batch.temperature[slots] = torch.tensor([1, 0.7, 1.3, 1, 1.5, 4, 0, 1.0], device=device)
    some = max(1, vocab // 3)
    top_k = torch.tensor([0, some, 0, vocab + 3, vocab // 2, 0, 5, 5], dtype=torch.int32)
    batch.top_k[slots] = top_k.to(device)
    batch.top_p[slots] = torch.tensor([1, 1, 0.6, 1, 0.8, 1, 0.5, 0.5], device=device)
    batch.min_p[slots] = torch.tensor([0, 0, 0, 0.2, 0.01, 0, 0, 0], device=device)
    batch.rows[7] = -1
    tokens = batch.check(config)
    assert int(tokens[7]) == -1
    assert int(tokens[:7].min()) >= 0


@pytest.mark.parametrize(
    ("top_k", "scale"), [(1, 1.0), (40, 0.01), (40, 1.0), (40, 30.0), (499, 0.01), (499, 1.0)]
)
def test_top_k_keeps_as_many(device: torch.device, top_k: int, scale: float) -> None:
    logits = _logits(1, 500, device, scale)
    batch = _batch(logits.expand(2, -1), temperature=50.0 * scale, top_k=top_k)
    kept = logits[0].topk(top_k).indices.tolist()
    assert set(batch.check(_SMALL if scale == 1.0 else None).tolist()) <= set(kept)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize(("top_k", "scale"), [(0, 0.01), (0, 2.0), (100, 2.0)])
def test_top_p_after_top_k(device: torch.device, top_p: float, top_k: int, scale: float) -> None:
    config = None if top_k else _SMALL
    _batch(_logits(2, 300, device, scale), top_k=top_k, top_p=top_p).check(config)


def test_the_largest_shapes_of_a_small_test(device: torch.device) -> None:
    batch = _batch(_logits(2, 5000, device), top_k=1000, top_p=0.95, temperature=1.1)
    batch.check()


def test_a_vocabulary_of_more_than_2_18_tokens(device: torch.device) -> None:
    logits = torch.zeros(1, 262_208, device=device)
    logits[0, 262_000:] = 9.0
    assert int(_batch(logits, min_p=0.5).check(DrawConfig(16384, 256, 16384, 256))) >= 262_000


@pytest.mark.parametrize("vocab", [1, 2**18, 2**18 + 1, 2**19 - 1, 2**19, MAX_VOCAB])
def test_sums_of_weights_do_not_overflow(vocab: int) -> None:
    """Of a vocabulary all of whose tokens are as likely as can be."""
    assert vocab * largest_weight(vocab) < 2**63
    # What is drawn from smaller ones stays what it was.
    assert vocab >= 2**19 or largest_weight(vocab) == 2.0**44


@pytest.mark.parametrize("values", [1, 3])
def test_tokens_as_likely_as_the_last_kept_are_kept(device: torch.device, values: int) -> None:
    # Few different values: a limit falls among equals, and halving ends at equals that do not fit.
    logits = torch.randint(0, values, (2, 100)).to(device, torch.float32)
    drawn = set()
    for _ in range(2):
        drawn |= set(_batch(logits, top_k=2, temperature=3.0).check(_SMALL).tolist())
    assert len(drawn) > 2
    _batch(logits, top_p=0.1, top_k=70).check(_SMALL)


@pytest.mark.parametrize(("room", "end_warps"), [(8, 8), (40, 8), (40, 0)])
def test_more_or_less_may_be_kept_than_is_gathered(
    device: torch.device, room: int, end_warps: int
) -> None:
    """All that may be kept; what is not sure to be; not even that."""
    logits = _logits(6, 200, device)
    logits[2:4] *= 0.01
    logits[5, 3:195] = float("-inf")
    batch = _batch(logits)
    slots = batch.rows.long()
    top_k = torch.tensor([0, 5, 0, 50, 150, 9], dtype=torch.int32)
    batch.top_k[slots] = top_k.to(device)
    batch.top_p[slots] = torch.tensor([0.9, 0.9, 0.5, 1, 0.95, 1], device=device)
    batch.min_p[slots] = torch.tensor([0, 0, 0.01, 0, 0, 0.05], device=device)
    batch.check(
        DrawConfig(64, 16, 64, 32, 2, room=room, end_warps=end_warps, end_block=32, programs=24)
    )


@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
def test_min_p(device: torch.device, min_p: float) -> None:
    logits = _logits(5, 300, device)
    tokens = _batch(logits, min_p=min_p, temperature=2.0).check()
    if min_p == 1.0:
        assert tokens.tolist() == logits.argmax(-1).tolist()


def test_masked_tokens_are_not_drawn(device: torch.device) -> None:
    logits = torch.full((2, 150), float("-inf"), device=device)
    logits[:, [3, 77, 140]] = torch.randn(2, 3).to(device)
    for top_k, top_p in ((0, 1.0), (1, 1.0), (100, 0.9)):
        tokens = _batch(logits, top_k=top_k, top_p=top_p).check(_SMALL)
        assert set(tokens.tolist()) <= {3, 77, 140}


def test_a_greedy_tie_goes_to_the_lowest_token(device: torch.device) -> None:
    logits = torch.zeros(3, 260, device=device)
    logits[0, [250, 70, 199]] = 2.0
    logits[1, [64, 63]] = 2.0
    assert _batch(logits, temperature=0.0).check(_SMALL).tolist() == [70, 63, 0]


def test_types_of_logits(device: torch.device, dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 130) * 3).to(device, dtype)
    _batch(logits, top_p=0.9).check()
    _batch(logits, temperature=0.0).check(_SMALL)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 3])
def test_unusable_rows_get_no_token(device: torch.device, temperature: float, top_k: int) -> None:
    logits = torch.randn(6, 100).to(device)
    logits[0, 99] = float("nan")
    logits[1, 0] = float("inf")
    logits[2] = float("-inf")
    logits[3] = float("nan")
    logits[5, 50] = float("nan")
    logits[5, 51] = float("inf")
    batch = _batch(logits, temperature=temperature, top_k=top_k)
    tokens = batch.check(_SMALL)
    assert (tokens < 0).tolist() == [True, True, True, True, False, True]
    last = batch.token_ids[batch.rows.long()]
    assert last.tolist() == [-7, -7, -7, -7, int(tokens[4]), -7]


def test_padding_writes_nothing_else(device: torch.device) -> None:
    batch = _batch(_logits(3, 50, device))
    batch.rows.fill_(-1)
    assert batch.check().tolist() == [-1, -1, -1]
    assert batch.token_ids.unique().tolist() == [-7]  # type: ignore[no-untyped-call]


def test_a_row_draws_the_same_in_any_batch(device: torch.device) -> None:
    batch = _batch(_logits(4, 300, device, 1.0), top_p=0.9, top_k=200)
    work = make_sampling_scratch(5, 300, device)
    for tensor in vars(work).values():
        tensor.view(torch.uint8).fill_(0xFF)  # NaN, and wild numbers
    together = batch.draw(work=work).tolist()
    assert batch.draw(work=work).tolist() == together
    order = [3, 1]
    some = replace(batch, logits=batch.logits[order], rows=batch.rows[order])
    assert some.draw(_SMALL).tolist() == [together[i] for i in order]
    alone = replace(batch, logits=batch.logits[2:3], rows=batch.rows[2:3])
    assert alone.draw(work=work).tolist() == together[2:3]


def test_the_key_is_that_of_a_draw(device: torch.device) -> None:
    # A draw from two tokens is decided by their random bits alone.
    seeds = range(20)
    batch = _batch(torch.zeros(20, 2, device=device))
    slots = batch.rows.long()
    for i, seed in enumerate(seeds):
        batch.context_lens[slots[i]] = 5 * i
        batch.stream[slots[i]] = draw_stream(seed, i % 3)
    bits = torch.tensor([draw_key(seed, seed % 3, 5 * seed) for seed in seeds])
    # Less is earlier; an unsigned comparison.
    outputs = random_bits(bits, 2) ^ torch.iinfo(torch.int64).min
    assert batch.draw().tolist() == outputs.argmin(-1).tolist()


def test_frequencies(device: torch.device) -> None:
    probability = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    num_draws = 64
    batch = _batch(probability.log().expand(num_draws, -1).to(device))
    counts = batch.draw().bincount(minlength=5).cpu()
    spread = (num_draws * probability * (1 - probability)).sqrt()
    assert bool(((counts - num_draws * probability).abs() < 5 * spread).all())
