"""Logprobs against transformers' log_softmax, and their bits whatever a step computes beside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from baton.shared.engine import logprobs
from baton.shared.engine.batch import Batch, BatchRow, WantedLogprobs
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.shaping import KnownTokens
from baton.shared.kv.drawn import Drawn, TokenLogprobs
from baton.shared.sampling import SamplingParams
from tests.unit.engine.conftest import MakeLlama, MakeRunner
from tests.unit.engine.test_logits_vs_transformers import DEMO, random_prompt

TOP = 20
NUM_DRAWN = 6


def expected(model: Any, token_ids: list[int]) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([token_ids])).logits[0].float(), -1)


def check(told: TokenLogprobs | None, row: Tensor, token_id: int, num_top: int) -> None:
    assert told is not None
    assert told.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
    assert told.rank == 1 + int((row > row[token_id] + 1e-6).sum())
    assert len(told.top_token_ids) == len(told.top_logprobs) == num_top
    best = row.topk(num_top)
    assert told.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)
    # Of equals any may come first.
    assert [float(row[each]) for each in told.top_token_ids] == pytest.approx(
        best.values.tolist(), abs=1e-4
    )


def prompt_rows(
    prompt: list[int], num_top: int, bounds: list[int], table: list[int], params: SamplingParams
) -> list[BatchRow]:
    """The chunks of a prompt, each asking for what follows its tokens."""
    rows = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        targets = prompt[start + 1 : end + 1]
        wanted = WantedLogprobs(0, targets, num_top) if targets else None
        sampling = params if end == len(prompt) else None
        row = BatchRow(prompt[start:end], start, [table], sampling, prompt_logprobs=wanted)
        rows.append(row)
    return rows


def compute(
    runner: ModelRunner, rows: list[BatchRow], beside: list[BatchRow] | None = None
) -> tuple[list[TokenLogprobs | None], Drawn]:
    """Row by row → what is told of the prompt, and what was drawn."""
    told: list[TokenLogprobs | None] = []
    drawn: list[Drawn] = []
    for row in rows:
        step = runner.launch(Batch([*(beside or ()), row]))
        drawn = list(step.result()[-1])
        if row.prompt_logprobs is not None:
            told += step.prompt_logprobs(len(beside or ()))
    return told, drawn[0]


def check_against(model: Any, runner: ModelRunner) -> None:
    params = SamplingParams(temperature=0.7, top_k=5, seed=3, logprobs=TOP, prompt_logprobs=3)
    table = list(range(8))
    prompt = random_prompt(70, runner.model_config.vocab_size)
    told, drawn = compute(runner, prompt_rows(prompt, 3, [0, 32, 33, 70], table, params))
    assert len(told) == len(prompt) - 1
    answer = [drawn]
    while len(answer) < NUM_DRAWN:
        position = len(prompt) + len(answer) - 1
        row = BatchRow([answer[-1].token_id], position, [table], params)
        answer += runner.forward(Batch([row]))[0]
    token_ids = prompt + [each.token_id for each in answer]
    rows = expected(model, token_ids)
    for position, each in enumerate(told, 1):
        check(each, rows[position - 1], prompt[position], 3)
    for position, drew in enumerate(answer, len(prompt)):
        # Of the model's own logits: neither temperature nor top_k shows.
        check(drew.logprobs, rows[position - 1], drew.token_id, TOP)


def test_the_demo_model(make_runner: MakeRunner) -> None:
    check_against(LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32), make_runner(DEMO))


def test_a_random_model(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    model_dir, model = make_llama()
    check_against(model, make_runner(model_dir))


@pytest.mark.exact
def test_bits_do_not_depend_on_what_else_is_computed(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    """Other chunks, other rows, and how many likeliest tokens those ask for."""
    model_dir, _ = make_llama()
    runner = make_runner(model_dir)
    params = SamplingParams(temperature=0, logprobs=2, prompt_logprobs=2)
    prompt, table = random_prompt(90, 320), list(range(8))
    alone = compute(runner, prompt_rows(prompt, 2, [0, 90], table, params))
    chunked = compute(runner, prompt_rows(prompt, 2, [0, 1, 17, 64, 89, 90], table, params))
    other = random_prompt(40, 320)
    beside = [
        BatchRow(other, 0, [[10, 11, 12]], replace(params, logprobs=TOP)),
        BatchRow(other[:1], 0, [[13]], replace(params, logprobs=0)),
        BatchRow(
            other[:20], 0, [[14, 15]], params, prompt_logprobs=WantedLogprobs(4, other[5:21], 9)
        ),
    ]
    in_company = compute(runner, prompt_rows(prompt, 2, [0, 50, 90], table, params), beside=beside)
    assert alone == chunked == in_company
    # Who asks for fewer sees the first of them.
    [[most]] = runner.forward(
        Batch([BatchRow(prompt[-1:], 89, [table], replace(params, logprobs=TOP))])
    )
    assert most.logprobs is not None and alone[1].logprobs is not None
    assert most.logprobs.top_logprobs[:2] == alone[1].logprobs.top_logprobs


def test_tokens_are_those_of_rows_that_do_not_ask(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    runner = make_runner(model_dir)
    params = SamplingParams(temperature=1.0, seed=11)
    prompt, table = random_prompt(40, 320), list(range(4))
    [[plain]] = runner.forward(Batch([BatchRow(prompt, 0, [table], params)]))
    asking = replace(params, logprobs=1, prompt_logprobs=1)
    _, drawn = compute(runner, prompt_rows(prompt, 1, [0, 16, 40], table, asking))
    assert drawn._replace(logprobs=None) == plain
    assert plain.logprobs is None


def test_they_are_of_the_model_s_own_logits(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    """Whatever changes what is drawn."""
    model_dir, model = make_llama()
    runner = make_runner(model_dir)
    prompt, table = random_prompt(40, 320), list(range(4))
    params = SamplingParams(
        temperature=0, logprobs=TOP, logit_bias=((17, 100.0),), allowed_token_ids=frozenset({17, 9})
    )
    history = KnownTokens(prompt, len(prompt))
    row = BatchRow(prompt, 0, [table], params, history=history)
    [[drawn]] = runner.forward(Batch([row]))
    assert drawn.token_id == 17
    check(drawn.logprobs, expected(model, prompt)[-1], 17, TOP)


def test_what_stands_of_drafts(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    """Each token that stands is told of as without drafts."""
    model_dir, _ = make_llama()
    runner = make_runner(model_dir)
    params = SamplingParams(temperature=0, logprobs=4)
    prompt, table = random_prompt(30, 320), list(range(8))
    answer = list(runner.forward(Batch([BatchRow(prompt, 0, [table], params)]))[0])
    for _ in range(4):
        position = len(prompt) + len(answer) - 1
        row = BatchRow([answer[-1].token_id], position, [table], params)
        answer += runner.forward(Batch([row]))[0]
    guesses = [answer[1].token_id, answer[2].token_id, (answer[3].token_id + 1) % 320]
    row = BatchRow([answer[0].token_id], len(prompt), [table], params, draft_ids=guesses)
    [drawn] = runner.forward(Batch([row]))
    assert list(drawn) == answer[1:4]


def test_a_long_prompt_s_logits_are_never_there_at_once(
    make_llama: MakeLlama, make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_MOST_AT_ONCE", 24 * 320)
    model_dir, _ = make_llama()
    runner = make_runner(model_dir)
    seen = []
    head = runner._model.logits

    def counted(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return head(hidden)

    monkeypatch.setattr(runner._model, "logits", counted)
    params = SamplingParams(temperature=0, prompt_logprobs=0)
    prompt = random_prompt(200, 320)
    told, _ = compute(runner, prompt_rows(prompt, 0, [0, 200], list(range(13)), params))
    assert len(told) == 199
    assert max(seen) <= 24 and sum(seen) >= 200


def test_logits_that_are_not_numbers(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    row = torch.randn(2, 320)
    row[1, 7] = float("nan")
    packed = logprobs.packed_logprobs(logprobs.log_probabilities(row), torch.tensor([5, -1]))
    good, bad = logprobs.unpacked_logprobs(packed.numpy(), [1, 1])
    assert good is not None and bad is None


def test_a_vocabulary_smaller_than_the_most_that_may_be_asked() -> None:
    row = torch.randn(1, 8)
    packed = logprobs.packed_logprobs(logprobs.log_probabilities(row), torch.tensor([3]))
    [told] = logprobs.unpacked_logprobs(packed.numpy(), [TOP])
    assert told is not None and len(told.top_logprobs) == 8
    assert sum(torch.tensor(told.top_logprobs).exp()) == pytest.approx(1.0, abs=1e-6)
