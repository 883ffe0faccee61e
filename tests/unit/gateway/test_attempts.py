"""What ends an attempt, and what it leaves to the next."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from baton.services.gateway import attempt as attempt_module
from baton.services.gateway.links import Event, Events, Failed, Token
from baton.shared.kv.sequence import FinishReason, Sequence
from baton.shared.rpc.errors import (
    Cancelled,
    ClaimBroken,
    Draining,
    EngineFailure,
    Preempted,
    from_rpc_error,
)
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from baton.v1.prefill_service_pb2 import PrefillRequest
from tests.unit.gateway.whole_gateway import whole_gateway

PROMPT = (4, 5, 6)
RECEIVED = (10, 11)
DRAWN = (12, 13, 14)


async def test_an_engine_can_tell_the_prompt_from_what_attempts_before_emitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one_after_the_other(sequence: Sequence, events: Events) -> None:
        """A token each attempt, which then fails, until the last one."""
        index = sequence.first_index
        token_id = DRAWN[index - len(RECEIVED)]
        is_last = token_id == DRAWN[-1]
        events.put_nowait(Token(index, token_id, FinishReason.LENGTH if is_last else None))
        if not is_last:
            events.put_nowait(Failed(Preempted("no free block"), None))

    async with whole_gateway(monkeypatch) as gateway:
        gateway.script = one_after_the_other
        sampling = types_pb2.SamplingParams(max_tokens=5, seed=1)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(token_ids=PROMPT), sampling=sampling, received_token_ids=RECEIVED
        )
        *_, finished = await gateway.ask_grpc(request)
        assert finished.finished.num_attempts == 3
        attempts = [sequence for _, sequence in gateway.started]
        assert [each.client_prompt_token_ids for each in attempts] == [PROMPT] * 3
        emitted = [each.emitted_token_ids for each in attempts]
        assert emitted == [RECEIVED, (*RECEIVED, 12), (*RECEIVED, 12, 13)]


# What a worker was told by the other one of the attempt's two

CLAIM_ENDED = Failed(ClaimBroken("ended by its owner"), None, is_hearsay=True)
FIRST = Token(0, 7, None)
GIVEN_UP = Failed(Cancelled("the reader gave its claim up"), None, is_hearsay=True)


async def ask_pair(
    monkeypatch: pytest.MonkeyPatch, *attempts: list[Event]
) -> tuple[pb.GenerateFinished, list[str]]:
    """One request: what comes of it, and the decode worker of each attempt. `attempts`: what the
    two workers say of each, one after the other; the attempt behind them ends the answer."""

    async def say(
        channel: object, incarnation: str, request: PrefillRequest, events: Events, _: float
    ) -> None:
        sequence = request.sequence
        whole: list[Event] = [Token(sequence.first_index, 7, FinishReason.STOP)]
        for event in [*attempts, whole][sequence.key.attempt - 1]:
            events.put_nowait(event)
            while not events.empty():
                await asyncio.sleep(0)

    monkeypatch.setattr(attempt_module, "follow_prefill", say)
    worker_ids = ("prefill-0", "decode-0", "decode-1")
    async with whole_gateway(monkeypatch, worker_ids=worker_ids) as gateway:
        gateway.script = lambda sequence, events: None
        sampling = types_pb2.SamplingParams(max_tokens=5, seed=1)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(token_ids=PROMPT), sampling=sampling)
        *_, last = await gateway.ask_grpc(request)
        return last.finished, [worker_id for worker_id, _ in gateway.started]


async def test_a_prompt_that_ends_with_its_first_token_takes_one_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prefill worker ends the claim with the sequence: of that the gateway may hear first."""
    finished, _ = await ask_pair(monkeypatch, [CLAIM_ENDED, Token(0, 7, FinishReason.STOP)])
    assert finished.num_attempts == finished.usage.num_completion_tokens == 1
    assert finished.finish_reason == types_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize("events", [[CLAIM_ENDED, FIRST], [FIRST, CLAIM_ENDED]])
async def test_a_claim_that_breaks_behind_the_first_token_ends_the_attempt(
    monkeypatch: pytest.MonkeyPatch, events: list[Event]
) -> None:
    finished, _ = await ask_pair(monkeypatch, events)
    assert finished.num_attempts == finished.usage.num_completion_tokens == 2


async def test_an_attempt_fails_as_the_worker_says_that_ended_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three failures of an engine end a request, three broken claims do not."""
    attempt: list[Event] = [CLAIM_ENDED, Failed(EngineFailure("the engine failed"), None)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask_pair(monkeypatch, attempt, attempt, attempt)
    assert isinstance(from_rpc_error(caught.value), EngineFailure)


async def test_a_decode_worker_that_leaves_is_doubted_when_the_source_tells_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaves = Failed(Draining("shutting down"), "decode-0-once")
    preempted = Failed(Preempted("no free block"), None)
    _, workers = await ask_pair(monkeypatch, [GIVEN_UP, leaves], [preempted])
    assert workers == ["decode-0", "decode-1", "decode-1"], "not in turn any more"


async def test_two_workers_that_were_told_by_each_other_end_the_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finished, _ = await ask_pair(monkeypatch, [CLAIM_ENDED, GIVEN_UP])
    assert finished.num_attempts == 2
