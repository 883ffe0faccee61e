"""Layers with a state of constant size, beside full ones and alone, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.capacity import GroupShare
from baton.shared.sampling import SamplingParams
from tests.recurrent import FULL, RECURRENT, known, make_recurrent
from tests.unit.engine.conftest import TINY, MakeRunner
from tests.unit.engine.test_logits_vs_transformers import check_logits, expected_tokens
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny

FIELDS: dict[str, Any] = {
    **TINY,
    "num_hidden_layers": 3,
    "layer_types": [RECURRENT, FULL, RECURRENT],
    "state_num_heads": 4,
    "state_head_dim": 10,
}
SHAPES: dict[str, dict[str, Any]] = {
    "beside-full": FIELDS,
    "alone": {**FIELDS, "num_hidden_layers": 2, "layer_types": [RECURRENT] * 2},
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPT = [3 + 7 * i % 300 for i in range(40)]


@pytest.fixture(autouse=True)
def recurrent() -> Iterator[None]:
    with known():
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_logits(shape: str, tmp_path: Path, make_runner: MakeRunner) -> None:
    model = make_recurrent(tmp_path, SHAPES[shape])
    check_logits(model, make_runner(tmp_path), min_span=10)


@pytest.mark.exact
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens(shape: str, tmp_path: Path, make_runner: MakeRunner) -> None:
    """In chunks and in one piece, together and alone."""
    model = make_recurrent(tmp_path, SHAPES[shape])
    loop = PlainLoop(make_runner(tmp_path))
    prompts = [PROMPT[:length] for length in (1, 16, 17, 40)]
    expected = [expected_tokens(model, prompt, GREEDY.max_tokens) for prompt in prompts]
    assert loop.generate(prompts, [GREEDY] * len(prompts), chunk=7) == expected
    assert loop.generate(prompts[-1:], [GREEDY]) == expected[-1:]


@pytest.mark.exact
def test_bits_do_not_depend_on_chunks_nor_on_what_a_slot_held(
    tmp_path: Path, make_runner: MakeRunner
) -> None:
    make_recurrent(tmp_path, FIELDS)
    runner = make_runner(tmp_path)
    runner.kv_cache.memory.fill_(0x41)
    whole = runner.logits(Batch([BatchRow(PROMPT, 0, [[0, 1, 2], [5]])]))
    slot = runner.kv_cache.tensors[1][5].clone()
    other = BatchRow(PROMPT[5:9], 0, [[9], [4]])
    for start, end in ((0, 1), (1, 17), (17, 39), (39, 40)):
        row = BatchRow(PROMPT[start:end], start, [[6, 7, 8], [3]])
        logits = runner.logits(Batch([other, row] if start else [row]))[-1]
    assert torch.equal(logits, whole[0])
    views = runner.kv_cache.typed(1)
    assert all(torch.equal(view[3], view[5]) for view in views)
    padding = runner.kv_cache.tensors[1][3] != slot
    assert bool((runner.kv_cache.tensors[1][3][padding] == 0x41).all())
    assert bool((runner.kv_cache.tensors[1][6:] == 0x41).all()), "no other slot was touched"
    assert bool((runner.kv_cache.padded_tensors[1][-1] == 0x41).all()), "nor the one behind them"


@pytest.mark.parametrize("end", [1, 17, 40])
def test_what_is_stored_is_read_and_not_written(
    end: int, tmp_path: Path, make_runner: MakeRunner
) -> None:
    """Of tokens whose keys and values others read, too, states alone are computed: to the same
    bits, and the blocks stay as they are, up to the token where storing begins."""
    make_recurrent(tmp_path, FIELDS)
    runner = make_runner(tmp_path)
    blocks, slots = runner.kv_cache.tensors
    whole = runner.logits(Batch([BatchRow(PROMPT, 0, [[0, 1, 2], [5]])]))
    before = blocks[:3].clone()
    # What would be written at a token beyond is not what is there.
    blocks[2, ..., 1:, :] = 0
    other = BatchRow(PROMPT[::-1], 0, [[9, 10, 11], [4]])
    runner.logits(Batch([other, BatchRow(PROMPT[:end], 0, [[0, 1, 2], [3]], num_stored=33)]))
    if end < 40:
        row = BatchRow(PROMPT[end:], end, [[0, 1, 2], [3]], num_stored=33)
        logits = runner.logits(Batch([row, BatchRow([9], 40, [[9, 10, 11], [4]])]))[:1]
        assert torch.equal(logits, whole)
    assert torch.equal(slots[3], slots[5]) and torch.equal(blocks[:3], before)
    blocks[:3] += 1
    kept = blocks[:2].clone()
    runner.logits(Batch([BatchRow(PROMPT[:end], 0, [[0, 1, 2], [3]], num_stored=33)]))
    assert torch.equal(blocks[:2], kept)


def test_pools_and_layout(tmp_path: Path, make_runner: MakeRunner) -> None:
    make_recurrent(tmp_path, FIELDS)
    runner = make_runner(tmp_path, num_blocks=20, max_num_seqs=6)
    full, states = runner.groups
    assert (full.layer_ids, states.layer_ids) == ((1,), (0, 2))
    # A head: 10 numbers of 4 bytes and 2 · 10 of 2, rounded up to 16 bytes each.
    assert states.constant_bytes == 4 * 2 * (48 + 48)
    assert runner.num_blocks == (20, 6)
    assert runner.capacity.groups == (GroupShare(0), GroupShare(1, 1))
    cache = runner.kv_cache
    assert [tuple(view.shape) for view in cache.typed(1)] == [(6, 4, 2, 10), (6, 4, 2, 2, 10)]
    assert [view.dtype for view in cache.typed(1)] == [torch.float32, torch.bfloat16]
    assert cache.words(1).shape == (7, 2, 96), "a piece is of one layer"
    cache.typed(1)[1][2, 3, 1, 1, 9] = 1.0
    [(slot, layer, word)] = cache.words(1).nonzero().tolist()
    assert (slot, layer, word // 24) == (2, 1, 3), "a head's words in a layer are its own"


def test_another_state_is_another_layout(tmp_path: Path, make_runner: MakeRunner) -> None:
    """Also where the bytes are as many."""
    layouts = set()
    others: list[dict[str, Any]] = [{"state_head_dim": 9}, {"layer_types": [RECURRENT, FULL, FULL]}]
    for number, changes in enumerate([{}, *others]):
        directory = tmp_path / str(number)
        make_recurrent(directory, {**FIELDS, **changes})
        layouts.add(make_runner(directory).kv_cache.layout()[1])
    assert len(layouts) == 3


STATEFUL = {
    "test_recurrent": FIELDS,
    "qwen3_next": TINY_MODELS["qwen3_next"]["uneven heads, some layers dense"],
    "qwen3_5_text": TINY_MODELS["qwen3_5_text"]["all linear"],
    "mamba2": next(iter(TINY_MODELS["mamba2"].values())),
    "falcon_h1": next(iter(TINY_MODELS["falcon_h1"].values())),
}


@pytest.mark.exact
@pytest.mark.parametrize("model_type", STATEFUL)
def test_a_state_has_seen_the_guesses_that_stand_and_no_others(
    model_type: str, tmp_path: Path, make_runner: MakeRunner
) -> None:
    """To the bit what tokens one by one leave, whatever is computed beside them."""
    if model_type == "test_recurrent":
        make_recurrent(tmp_path, FIELDS)
    else:
        make_tiny(tmp_path, model_type, STATEFUL[model_type])
    runner = make_runner(tmp_path, num_drafts=3)
    assert runner.determinism == "exact"

    def row(token_ids: list[int], position: int, first: int, **how: Any) -> BatchRow:
        """`first`: of its slots, and of its blocks."""
        tables = [
            list(range(4 * first, 4 * first + 4)) if group.spec.grows else [first]
            for group in runner.groups
        ]
        return BatchRow(token_ids, position, tables, GREEDY, **how)

    def slots(number: int) -> list[torch.Tensor]:
        tensors = zip(runner.groups, runner.kv_cache.tensors, strict=True)
        return [tensor[number].clone() for group, tensor in tensors if not group.spec.grows]

    def draw(*rows: BatchRow) -> list[list[int]]:
        return [[each.token_id for each in drawn] for drawn in runner.forward(Batch(rows))]

    answer = draw(row(PROMPT[:17], 0, 0))[0]
    states = [slots(0)]
    for position in range(17, 32):
        answer += draw(row(answer[-1:], position, 0))[0]
        states.append(slots(0))
    draw(row(PROMPT[:17], 0, 1))
    index, chunk = 0, 0
    for num_right in (0, 3, 1, 2, 3):
        guesses = answer[index + 1 : index + 4]
        for place in range(num_right, 3):
            guesses[place] = (guesses[place] + 1) % 300
        others = row(PROMPT[chunk : chunk + 3], chunk, 2), row([5], 0, 3)
        guessed = row([answer[index]], 17 + index, 1, draft_ids=guesses)
        [*_, drawn] = draw(*others, guessed)
        index, chunk = index + num_right + 1, chunk + 3
        assert drawn == answer[index - num_right : index + 1]
        assert all(map(torch.equal, slots(1), states[index]))
