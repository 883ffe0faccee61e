"""The engine over the Triton kernels against the torch reference: logits, tokens, steps ahead."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from baton.kernels.batch_state import scatter
from baton.shared.engine import device_choices
from baton.shared.engine.batch import Batch, BatchRow, WantedLogprobs
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.drawn import Drawn, TokenLogprobs
from baton.shared.sampling import SamplingParams
from tests.weights import weight_shapes

# Hashes wrap around; NumPy, which the interpreter computes with, would rather not.
pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 83,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 160,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
Make = Callable[..., ModelRunner]


SMALL = {
    **CONFIG,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
"""For what does not depend on the model: each program takes the interpreter a while."""


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Runners over one random llama, whose logits are far apart."""
    return maker(tmp_path_factory.mktemp("tiny"), SMALL)


def maker(directory: Path, config: dict[str, Any]) -> Make:
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.rand(shape, generator=generator) + 0.5
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.3
        for name, shape in weight_shapes(directory).items()
    }
    save_file(weights, directory / "model.safetensors")

    def make_runner(kernels: str, device: torch.device, **changes: Any) -> ModelRunner:
        fields = {"num_blocks": 40, "max_num_seqs": 4, "dtype": "float32", **changes}
        return ModelRunner(EngineConfig(directory, device.type, kernels=kernels, **fields))

    return make_runner


@pytest.fixture(scope="module")
def reference(make: Make) -> ModelRunner:
    return make("torch", torch.device("cpu"))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step has not written itself holds numbers that are too large to compute with: where
    one is used, NumPy, which the interpreter computes with, warns of the result."""
    empty_like = torch.empty_like

    def poisoned(*arguments: Any, **options: Any) -> torch.Tensor:
        made = empty_like(*arguments, **options)
        if made.dtype.is_floating_point:
            made.fill_(min(1e38, torch.finfo(made.dtype).max))
        return made

    monkeypatch.setattr(torch, "empty_like", poisoned)


def tokens(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(CONFIG["vocab_size"]), k=length)


def test_logits_of_chunks_and_decode_rows(tmp_path: Path, device: torch.device) -> None:
    """Chunks over cached prefixes, single tokens and fresh prompts in one step."""
    make = maker(tmp_path, CONFIG)
    runner, reference = make("triton", device), make("torch", torch.device("cpu"))
    table = {"a": [7, 3, 30, 9], "b": [12, 1], "c": [20, 21, 22, 39]}
    a, b, c = tokens(40, 1), tokens(17, 2), tokens(50, 3)
    steps = [
        [BatchRow(a[:33], 0, [table["a"]]), BatchRow(b[:1], 0, [table["b"]])],
        [
            BatchRow(c[:20], 0, [table["c"]]),
            BatchRow(a[33:34], 33, [table["a"]]),
            BatchRow(b[1:16], 1, [table["b"]]),
        ],
        [
            BatchRow(a[34:35], 34, [table["a"]]),
            BatchRow(b[16:], 16, [table["b"]]),
            BatchRow(c[20:], 20, [table["c"]]),
        ],
        [BatchRow(a[35:36], 35, [table["a"]])],
    ]
    for rows in steps:
        expected = reference.logits(Batch(rows))
        actual = runner.logits(Batch(rows)).cpu()
        error = (actual - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-4


def test_logits_over_keys_and_values_in_8_bits(
    make: Make, reference: ModelRunner, device: torch.device
) -> None:
    """A number that lies between two codes may go to either. How far off 16 bits' are says that
    this is no wider than it must be."""
    runner = make("triton", device, kv_cache_dtype="fp8")
    same = make("torch", torch.device("cpu"), kv_cache_dtype="fp8")
    prompt, table = tokens(21, 1), [[7, 3]]
    for start, end in ((0, 17), (17, 20), (20, 21)):
        batch = Batch([BatchRow(prompt[start:end], start, table)])
        expected, actual = same.logits(batch), runner.logits(batch).cpu()
        plain = reference.logits(batch)
        assert float((actual - expected).norm()) < 0.1 * float((plain - expected).norm())


def test_a_prompt_whose_last_chunk_is_one_token(
    make: Make, reference: ModelRunner, device: torch.device
) -> None:
    """It goes with the decode rows, but its token is the prompt's, and nothing was drawn before."""
    runner = make("triton", device)
    params = SamplingParams(temperature=0.0, max_tokens=9)
    prompt, table = tokens(33, 9), [[4, 2, 8]]
    [expected] = reference.forward(Batch([BatchRow(prompt, 0, table, params)]))
    handle = runner.open_row(params, 0)
    steps = [
        runner.launch(Batch([BatchRow(prompt[:16], 0, table, None, 0, handle)])),
        runner.launch(Batch([BatchRow(prompt[16:17], 16, table, None, 0, handle)])),
        runner.launch(Batch([BatchRow(prompt[17:32], 17, table, None, 0, handle)])),
        runner.launch(Batch([BatchRow(prompt[32:], 32, table, params, 0, handle)])),
    ]
    assert [step.result() for step in steps] == [[[]], [[]], [[]], [expected]]


def test_tokens_of_steps_launched_ahead(
    make: Make, reference: ModelRunner, device: torch.device
) -> None:
    """Two sequences, prompts in chunks, each step launched before the last one's tokens are taken;
    one ends and its slot goes to a third."""
    runner = make("triton", device, cuda_graphs=True)
    params = SamplingParams(temperature=0.0, max_tokens=9)
    prompts = [tokens(19, 5), tokens(7, 6), tokens(5, 7)]
    tables = [[[5, 6, 7]], [[0, 1]], [[11, 12]]]
    expected = [
        _alone(reference, prompt, table, params)
        for prompt, table in zip(prompts, tables, strict=True)
    ]
    handles = [runner.open_row(params, 0) for _ in range(2)]

    def chunk(i: int, start: int, end: int) -> BatchRow:
        draws = params if end == len(prompts[i]) else None
        return BatchRow(prompts[i][start:end], start, tables[i], draws, 0, handles[i])

    def decode(i: int, position: int) -> BatchRow:
        return BatchRow(None, position, tables[i], params, 0, handles[i])

    launched = [
        runner.launch(Batch([chunk(0, 0, 16), chunk(1, 0, 7)])),
        runner.launch(Batch([chunk(0, 16, 19), decode(1, 7)])),
    ]
    drawn: list[list[Drawn]] = [[], [], []]
    results = [launched.pop(0).result()]
    launched.append(runner.launch(Batch([decode(0, 19), decode(1, 8)])))
    results.append(launched.pop(0).result())
    drawn[1] += [*results[0][1], *results[1][1]]
    drawn[0] += results[1][0]
    runner.close_row(handles[1])
    handles[1] = handles[0]
    handles.append(runner.open_row(params, 0))
    launched.append(runner.launch(Batch([decode(0, 20), chunk(2, 0, 5)])))
    drawn[0] += launched.pop(0).result()[0]
    launched.append(runner.launch(Batch([decode(2, 5), decode(0, 21)])))
    zero, two = launched.pop(0).result()
    drawn[0] += zero
    drawn[2] += two
    two, zero = launched.pop(0).result()
    drawn[0] += zero
    drawn[2] += two
    for got, answer in zip(drawn, expected, strict=True):
        assert got == answer[: len(got)] and len(got) >= 2


def test_a_step_that_was_not_launched_leaves_nothing_behind(
    make: Make, reference: ModelRunner, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in what the device is told next, where of two values for one place either may win,
    nor in what the host takes for known there."""
    runner = make("triton", device, prompt_graphs=False)
    params = SamplingParams(temperature=0.0, max_tokens=9)
    prompts = [tokens(19, 5), tokens(7, 6), tokens(5, 7)]
    tables = [[[5, 6, 7]], [[0, 1]], [[11, 12]]]
    expected = [
        _alone(reference, prompt, table, params)
        for prompt, table in zip(prompts, tables, strict=True)
    ]
    handles = [runner.open_row(params, 0) for _ in prompts]

    def prompt_of(i: int) -> BatchRow:
        return BatchRow(prompts[i], 0, tables[i], params, 0, handles[i])

    def decode(i: int, index: int) -> BatchRow:
        token_id = expected[i][index].token_id
        return BatchRow([token_id], len(prompts[i]) + index, tables[i], params, 0, handles[i])

    assert runner.forward(Batch([prompt_of(0), prompt_of(1)])) == [
        [expected[0][0]],
        [expected[1][0]],
    ]
    updates: list[torch.Tensor] = []

    def remember(state: torch.Tensor, sent: torch.Tensor) -> None:
        updates.append(sent.clone())
        scatter(state, sent)

    with monkeypatch.context() as patch:
        patch.setattr("baton.shared.engine.launched_steps.chunk_columns", _fail)
        with pytest.raises(MemoryError):
            runner.launch(Batch([decode(0, 0), prompt_of(2)]))
    monkeypatch.setattr("baton.shared.engine.host_buffers.scatter", remember)
    assert runner.forward(Batch([decode(1, 0)])) == [[expected[1][1]]]
    assert runner.forward(Batch([decode(0, 0)])) == [[expected[0][1]]]
    assert runner.forward(Batch([prompt_of(2), decode(0, 1)])) == [
        [expected[2][0]],
        [expected[0][2]],
    ]
    for offsets, _ in updates:
        assert len(offsets.unique()) == len(offsets)
    assert updates


def test_a_row_with_drafts_draws_what_it_draws_token_by_token(
    make: Make, reference: ModelRunner, device: torch.device
) -> None:
    """Right drafts, wrong ones, none, beside a prompt's chunk and alone; what follows goes on from
    where the device found the last right one, though the host learns it later."""
    runner = make("triton", device, num_drafts=3)
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=4, max_tokens=12)
    prompts = [tokens(19, 5), tokens(7, 6), tokens(21, 7)]
    tables = [[[5, 6, 7]], [[0, 1]], [[11, 12, 13]]]
    expected = [
        _alone(reference, prompt, table, params, 11)
        for prompt, table in zip(prompts, tables, strict=True)
    ]
    answers = [[drawn.token_id for drawn in each] for each in expected]
    handles = [runner.open_row(params, 0) for _ in prompts]

    def chunk(i: int, start: int, end: int) -> BatchRow:
        draws = params if end == len(prompts[i]) else None
        return BatchRow(prompts[i][start:end], start, tables[i], draws, 0, handles[i])

    def row(i: int, index: int, drafts: list[int]) -> BatchRow:
        """Of the token at `index` of the answer, or the highest that it may be at."""
        return BatchRow(None, len(prompts[i]) + index, tables[i], params, 0, handles[i], drafts)

    def wrong(token_id: int) -> int:
        return (token_id + 1) % int(CONFIG["vocab_size"])

    first, second = answers[0], answers[1]
    firsts = [[expected[0][0]], [expected[1][0]]]
    assert runner.forward(Batch([chunk(0, 0, 19), chunk(1, 0, 7)])) == firsts
    # Two of three drafts are right; the other row has one, which is wrong.
    drafts = [*first[1:3], wrong(first[3])]
    launched = [
        runner.launch(Batch([row(0, 0, drafts), row(1, 0, [wrong(second[1])]), chunk(2, 0, 16)])),
        # Nobody knows yet that these are two and one positions further back.
        runner.launch(Batch([row(1, 2, []), row(0, 4, [])])),
    ]
    assert launched.pop(0).result() == [expected[0][1:4], expected[1][1:2], []]
    assert [handles[0].drawn_at, handles[1].drawn_at] == [19 + 4, 7 + 2]
    assert launched.pop(0).result() == [expected[1][2:3], expected[0][4:5]]
    # All right, beside one without drafts; and what was drawn last is known now.
    step = [row(0, 4, first[5:8]), row(1, 2, []), chunk(2, 16, 21)]
    assert runner.forward(Batch(step)) == [expected[0][5:9], expected[1][3:4], expected[2][:1]]
    known = BatchRow([second[3]], 7 + 3, tables[1], params, 0, handles[1], second[4:6])
    assert runner.forward(Batch([known])) == [expected[1][4:7]]
    with pytest.raises(ValueError, match="3 drafts"):
        runner.launch(Batch([row(0, 8, first[:4])]))


def test_logits_at_several_tokens_of_a_row(
    make: Make, reference: ModelRunner, device: torch.device
) -> None:
    """Of prompt chunks, and of a row with drafts: what each would have as the last token."""
    runner = make("triton", device, num_drafts=2)
    prompt, other = tokens(30, 1), tokens(20, 2)
    tables = [[[7, 3]], [[9, 30]]]
    rows = [
        BatchRow(prompt[:26], 0, tables[0], num_logits=4),
        BatchRow(other[:17], 0, tables[1], num_logits=17),
    ]
    whole = reference.logits(Batch(rows))
    assert len(whole) == 21
    for number, end in enumerate(range(23, 27)):
        alone = reference.logits(Batch([BatchRow(prompt[:end], 0, tables[0])]))
        assert torch.equal(alone[0], whole[number])
    behind = [
        BatchRow(other[17:18], 17, tables[1], draft_ids=other[18:20], num_logits=3),
        BatchRow(prompt[26:29], 26, tables[0], num_logits=2),
    ]
    for batch, expected in ((rows, whole), (behind, reference.logits(Batch(behind)))):
        actual = runner.logits(Batch(batch)).cpu()
        assert actual.shape == expected.shape
        error = (actual - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-4


def _fail(*_: Any, **__: Any) -> None:
    raise MemoryError


def _alone(
    runner: ModelRunner,
    prompt: list[int],
    table: list[list[int]],
    params: SamplingParams,
    num_more: int = 4,
) -> list[Drawn]:
    [[token]] = runner.forward(Batch([BatchRow(prompt, 0, table, params)]))
    drawn = [token]
    for position in range(len(prompt), len(prompt) + num_more):
        [[token]] = runner.forward(Batch([BatchRow([token.token_id], position, table, params)]))
        drawn.append(token)
    return drawn


def test_logprobs_of_drawn_tokens_and_of_prompts(
    make: Make,
    reference: ModelRunner,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks, decode rows and drafts, of the rows that ask and of no others; a prompt's own in
    slices; steps launched ahead."""
    runner = make("triton", device, num_drafts=3, cuda_graphs=True)
    monkeypatch.setattr(runner._executor._launched, "rows_at_once", 8)  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=4, max_tokens=12)
    asks = replace(params, logprobs=3)
    prompt, other = tokens(33, 5), tokens(9, 6)
    tables = [[[5, 6, 7]], [[0, 1]]]
    expected = _alone(reference, prompt, tables[0], asks, 7)
    silent = _alone(reference, other, tables[1], params, 4)
    wanted = WantedLogprobs(2, prompt[3:], 2)
    whole = reference.launch(Batch([BatchRow(prompt, 0, tables[0], prompt_logprobs=wanted)]))
    assert whole.result() == [[]]
    of_prompt = whole.prompt_logprobs(0)
    assert len(of_prompt) == 30

    handles = [runner.open_row(asks, 0), runner.open_row(params, 0)]

    def chunk(start: int, end: int) -> BatchRow:
        first = max(start, 2)
        targets = prompt[first + 1 : end + 1]
        return BatchRow(
            prompt[start:end],
            start,
            tables[0],
            asks if end == len(prompt) else None,
            handle=handles[0],
            prompt_logprobs=WantedLogprobs(first - start, targets, 2) if targets else None,
        )

    def row(i: int, position: int, sampling: SamplingParams, drafts: list[int]) -> BatchRow:
        return BatchRow(None, position, tables[i], sampling, 0, handles[i], drafts)

    told: list[TokenLogprobs | None] = []
    # A chunk of one token that asks is a chunk all the same.
    for start, end in ((0, 16), (16, 17), (17, 32)):
        step = runner.launch(Batch([chunk(start, end)]))
        assert step.result() == [[]]
        told += step.prompt_logprobs(0)
    _check_told(told, of_prompt)
    second = BatchRow(other, 0, tables[1], params, 0, handles[1])
    drawn = runner.forward(Batch([chunk(32, 33), second]))
    _check_drawn(drawn[0], expected[:1])
    assert drawn[1] == silent[:1]
    answer = [each.token_id for each in expected]
    launched = [
        # One step with drafts, of which two stand, and one of graphs.
        runner.launch(
            Batch([row(0, 33, asks, [*answer[1:3], (answer[3] + 1) % 83]), row(1, 9, params, [])])
        ),
        runner.launch(Batch([row(1, 10, params, []), row(0, 37, asks, [])])),
    ]
    drawn = launched.pop(0).result()
    _check_drawn(drawn[0], expected[1:4])
    assert drawn[1] == silent[1:2]
    drawn = launched.pop(0).result()
    assert drawn[0] == silent[2:3]
    _check_drawn(drawn[1], expected[4:5])
    # The head makes logits again for who asks, and for nobody else.
    num_heads: list[int] = []
    head = runner._model.logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        num_heads.append(len(hidden))
        return head(hidden)

    monkeypatch.setattr(runner._model, "logits", counted)
    at = [handle.drawn_at for handle in handles]
    for asked, num in ((row(0, at[0], asks, []), 2), (row(1, at[1], params, []), 1)):
        num_heads.clear()
        runner.forward(Batch([asked]))
        # A graph has its own launches.
        assert len(num_heads) == num - (device.type == "cuda")


def _check_drawn(drawn: Sequence[Drawn], expected: Sequence[Drawn]) -> None:
    assert [each.token_id for each in drawn] == [each.token_id for each in expected]
    _check_told([each.logprobs for each in drawn], [each.logprobs for each in expected])


def _check_told(
    told: Sequence[TokenLogprobs | None], expected: Sequence[TokenLogprobs | None]
) -> None:
    assert len(told) == len(expected)
    for got, known in zip(told, expected, strict=True):
        assert got is not None and known is not None
        assert got.logprob == pytest.approx(known.logprob, abs=1e-3)
        assert (got.rank, got.top_token_ids) == (known.rank, known.top_token_ids)
        assert got.top_logprobs == pytest.approx(known.top_logprobs, abs=1e-3)


def test_masks_of_chunks_decode_rows_and_drafts(
    make: Make, reference: ModelRunner, device: torch.device
) -> None:
    """Constrained rows beside others, in every kind of step; what was masked once is free again."""
    runner = make("triton", device, max_num_seqs=3, num_drafts=2)
    drafting = make("torch", torch.device("cpu"), num_drafts=2)
    params = SamplingParams(temperature=0.8, seed=9, max_tokens=30)
    prompts = [tokens(19, 5), tokens(7, 6), tokens(5, 7)]
    tables = [[[5, 6, 7]], [[0, 1]], [[11, 12]]]
    masks = random.Random(2)

    def mask(num_draws: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
        allowed = np.zeros((num_draws, 3), np.uint32)
        for row in allowed:
            for token in masks.sample(range(CONFIG["vocab_size"]), 2):
                row[token // 32] |= np.uint32(1 << token % 32)
        return allowed

    def both(*rows: tuple[int, list[Any]]) -> list[Any]:
        step = runner.launch(Batch([_masked(opened[0][i], *row) for i, row in rows]))
        # The reference gets them when it has computed.
        batch = [_masked(opened[1][i], *row[:-1], None) for i, row in rows]
        begun = drafting.begin(Batch(batch))
        late = {place: row[-1] for place, (_, row) in enumerate(rows) if row[-1] is not None}
        actual, expected = step.result(), begun.draw(late).result()
        assert actual == expected
        return list(expected)

    opened = [[each.open_row(params, 0) for _ in prompts] for each in (runner, drafting)]
    first = [mask(1), mask(1), None]
    drawn = both(*((i, [prompts[i], 0, tables[i], params, (), first[i]]) for i in range(3)))
    for each, allowed in zip(drawn[:2], first[:2], strict=True):
        token = each[0].token_id
        assert allowed is not None and allowed[0, token // 32] >> np.uint32(token % 32) & 1
    at = [len(prompt) for prompt in prompts]
    last = [[each[0].token_id] for each in drawn]
    # Then rows of one token, one of them with drafts: of those the masks say which stand.
    second = mask(3)
    token = next(t for t in range(83) if second[0, t // 32] >> np.uint32(t % 32) & 1)
    second[0] = 0
    second[0, token // 32] = np.uint32(1 << token % 32)
    drawn = both(
        (0, [last[0], at[0], tables[0], params, (token, 3), second]),
        (1, [last[1], at[1], tables[1], params, (), mask(1)]),
        (2, [last[2], at[2], tables[2], params, (), None]),
    )
    assert drawn[0][0].token_id == token and len(drawn[0]) >= 2
    both((2, [[drawn[2][0].token_id], at[2] + 1, tables[2], params, (), None]))


def _masked(handle: Any, *row: Any) -> BatchRow:
    token_ids, position, tables, params, draft_ids, masks = row
    return BatchRow(token_ids, position, tables, params, 0, handle, draft_ids, masks=masks)


LATENT: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 4,
    "v_head_dim": 32,
    "max_position_embeddings": 160,
    "eos_token_id": 2,
}


def test_latents_in_both_forms(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole prompts, a chunk behind a prefix, and a decode row beside it; then decode rows alone,
    whose queries are absorbed as they are stored."""
    asked: list[int] = []
    forms = iter([True, False, False, True])

    def expands(num_queries: int, num_keys: int, **_: int) -> bool:
        asked.append(num_keys)
        return next(forms)

    make = maker(tmp_path, LATENT)
    both = [make("torch", torch.device("cpu")), make("triton", device)]
    monkeypatch.setattr("baton.shared.engine.device_latents.expands", expands)
    prompt = tokens(31, 1)
    chunk = BatchRow(prompt[18:], 18, [[3, 1]])
    steps = [
        [BatchRow(prompt[:18], 0, [[3, 1]]), BatchRow(tokens(2, 4), 0, [[7]])],
        [chunk, BatchRow([9], 2, [[7]])],
        [chunk],
        [BatchRow([8], 31, [[3, 1]]), BatchRow([9], 3, [[7]])],
    ]
    for rows in steps:
        expected, got = (runner.logits(Batch(rows)).cpu() for runner in both)
        limit = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(got, expected, atol=limit, rtol=0)
    assert asked == [18, 2, 31, 31], "in the last layer, tokens that are wanted are rows of one"


@pytest.mark.parametrize("kinds", [*permutations(["full_attention", "sliding_attention"])])
def test_tables_behind_a_window_grow_by_themselves(
    tmp_path: Path, device: torch.device, kinds: tuple[str, str]
) -> None:
    """While a prompt is computed they have room for a few tokens ahead; the others, which stand
    before or behind them, for all."""
    config = {
        **SMALL,
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
        "layer_types": kinds,
    }
    make = maker(tmp_path, config)
    params = SamplingParams(temperature=0.0)
    prompt, whole, windowed = tokens(80, 1), [7, 1, 5, 3, 9, 10], [8, 2, 6, 4, 11, 12]
    answers = []
    for runner in (make("torch", torch.device("cpu")), make("triton", device)):
        handle, token_ids = runner.open_row(params, 0), [*prompt]
        for start, end, num_windowed in ((0, 32, 3), (32, 64, 4), (64, 80, 5), (80, 81, 6)):
            tables = {"full_attention": whole, "sliding_attention": windowed[:num_windowed]}
            row = BatchRow(token_ids[start:end], start, [tables[kind] for kind in kinds])
            row.handle, row.sampling = handle, params if end >= len(prompt) else None
            [drawn] = runner.launch(Batch([row])).result()
            token_ids += [each.token_id for each in drawn]
        answers.append(token_ids[len(prompt) :])
    assert answers[0] == answers[1] and len(answers[0]) == 2


DELTA: dict[str, Any] = {
    **SMALL,
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}


def test_states_of_rows_and_of_nobody(tmp_path: Path, device: torch.device) -> None:
    """Whole prompts, chunks behind a state, rows of one token and padding in one step; states that
    are kept on the way. Other slots, that behind the last one too, hold what they held."""
    make = maker(tmp_path, DELTA)
    reference = make("torch", torch.device("cpu"), max_num_seqs=6)
    runner = make("triton", device, max_num_seqs=6, cuda_graphs=True)
    for each in (reference, runner):
        each.kv_cache.memory[each.kv_cache.pools[1].offset_bytes :].fill_(0x41)
    a, b = tokens(50, 1), tokens(9, 2)

    def row(ids: list[int], position: int, slot: int, **more: Any) -> BatchRow:
        return BatchRow(ids, position, [[*range(6 * slot, 6 * slot + 6)], [slot]], **more)

    steps = [
        [row(a[:40], 0, 3, keeps=[(1, [NO_BLOCK, 5]), (36, [NO_BLOCK, 2])]), row(b[:1], 0, 1)],
        [row(a[40:41], 40, 3), row(b[1:2], 1, 1), row(a[:1], 0, 0)],
        [row(a[41:], 41, 3), row(b[2:7], 2, 1), row(a[1:2], 1, 0)],
    ]
    for rows in steps:
        expected, got = (each.logits(Batch(rows)).cpu() for each in (reference, runner))
        limit = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(got, expected, atol=limit, rtol=0)
    views = zip(reference.kv_cache.typed(1), runner.kv_cache.typed(1), strict=True)
    for expected, got in views:
        torch.testing.assert_close(got.cpu(), expected, atol=1e-4, rtol=1e-4)
        assert bool((got[4].view(torch.uint8) == 0x41).all()), "a slot that no row had"
    behind = runner.kv_cache.padded_tensors[1][-1]
    assert bool((behind == 0x41).all()), "the one behind them"
    # From the state that was kept, the rest of the prompt.
    moved = BatchRow(a[36:41], 36, [[*range(18, 24)], [2]])
    whole = reference.logits(Batch([row(a[:41], 0, 0)]))
    torch.testing.assert_close(runner.logits(Batch([moved])).cpu(), whole, atol=1e-4, rtol=0)


def test_a_worker_of_one_row_that_guesses_warms_up(
    make: Make, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no room for a prompt beside a row with guesses: no such step is tried."""
    runner: Any = make("triton", device, num_drafts=2, max_num_seqs=1)
    if device.type == "cuda":
        return
    # As on a GPU, but that nothing is computed.
    launched: list[int] = []

    def launch(batch: Batch) -> SimpleNamespace:
        launched.append(len(batch.rows))
        return SimpleNamespace(result=lambda: None)

    for name, instead in (
        ("launch", launch),
        ("capture", lambda **_: None),
        ("capture_prompts", lambda _: None),
    ):
        monkeypatch.setattr(runner._executor, name, instead)
    monkeypatch.setattr(runner, "block_sums", lambda: lambda *_: None)
    monkeypatch.setattr(device_choices, "why_no_triton", lambda _: None)
    monkeypatch.setattr(runner, "device", SimpleNamespace(type="cuda"))
    runner._warm_up(lambda _: None)
    assert max(launched) == 1
