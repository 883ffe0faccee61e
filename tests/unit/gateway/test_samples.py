"""Several samples of one prompt: where each goes, what comes back, what ends all of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from baton.services.gateway import attempt as attempt_module
from baton.services.gateway.admission import MAX_SAMPLES, AdmittedRequest
from baton.services.gateway.links import Events, Failed, Joined, Token
from baton.services.gateway.merged import merged
from baton.services.gateway.openai.completions import MAX_CHOICES
from baton.shared.directory.workers import WorkerLoad
from baton.shared.kv.sequence import FinishReason, Sequence
from baton.shared.rpc.convert import add_sequence
from baton.shared.rpc.errors import EngineFailure, WorkerLost
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from baton.v1.prefill_service_pb2 import PrefillRequest
from tests.unit.gateway.null_frontend import events
from tests.unit.gateway.whole_gateway import TOKEN, whole_gateway, worker_record

PROMPT = [*range(3, 43)]


def request(n: int | None = None, **fields: Any) -> pb.GenerateRequest:
    sampling = types_pb2.SamplingParams(max_tokens=3, seed=1)
    fields = {"token_ids": pb.TokenIds(token_ids=PROMPT), "sampling": sampling, **fields}
    return pb.GenerateRequest(n=n, **fields)


def whole_answer(sequence: Sequence, events: Events) -> None:
    """Tokens that tell the sample and the index: 100, 101, … of the first, 200, … of the second."""
    for index in range(sequence.first_index, sequence.params.max_tokens):
        is_last = index == sequence.params.max_tokens - 1
        token_id = 100 * (sequence.key.sample + 1) + index
        events.put_nowait(Token(index, token_id, FinishReason.LENGTH if is_last else None))


def tokens_by_sample(responses: list[pb.GenerateResponse]) -> dict[int, list[int]]:
    """Also checks the order: started, chunks without gaps, the end of each sample."""
    tokens: dict[int, list[int]] = {}
    ended = set()
    assert responses[0].HasField("started") and responses[-1].HasField("finished")
    for response in responses[1:]:
        if response.HasField("chunk"):
            chunk = response.chunk
            assert chunk.sample not in ended
            tokens.setdefault(chunk.sample, [])
            if tokens[chunk.sample]:
                assert chunk.first_index == len(tokens[chunk.sample])
            tokens[chunk.sample] += chunk.token_ids
        else:
            assert response.finished.sample not in ended
            ended.add(response.finished.sample)
    return tokens


async def test_each_sample_is_a_sequence_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async with whole_gateway(monkeypatch) as gateway:
        gateway.script = whole_answer
        responses = await gateway.ask_grpc(request(3))
        assert tokens_by_sample(responses) == {
            i: [100 * i + 100 + j for j in range(3)] for i in range(3)
        }
        keys = [sequence.key for _, sequence in gateway.started]
        assert len({key.request_id for key in keys}) == 1
        assert [(key.sample, key.attempt) for key in keys] == [(0, 1), (1, 1), (2, 1)]
        for response in responses:
            if response.HasField("finished"):
                usage = response.finished.usage
                assert (usage.num_prompt_tokens, usage.num_completion_tokens) == (len(PROMPT), 3)
        [one] = tokens_by_sample(await gateway.ask_grpc(request())).items()
        assert one == (0, [100, 101, 102])


async def test_others_start_when_the_first_has_a_token_and_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the directory knows nothing of so short a prompt, and others are less busy."""
    first: list[Events] = []

    def script(sequence: Sequence, events: Events) -> None:
        if not first:
            first.append(events)
        else:
            whole_answer(sequence, events)

    worker_ids = ("both-0", "both-1", "both-2")
    async with whole_gateway(monkeypatch, worker_ids=worker_ids) as gateway:
        gateway.script = script
        asking = asyncio.create_task(gateway.ask_grpc(request(5)))
        while not first:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert len(gateway.started) == 1
        first[0].put_nowait(Joined(32, None))
        first[0].put_nowait(Token(0, TOKEN, FinishReason.STOP))
        responses = await asking
        assert len(gateway.started) == 5
        assert len({worker_id for worker_id, _ in gateway.started}) == 1
        # What the others found was not there before the request.
        cached = [r.finished.usage.num_cached_tokens for r in responses if r.HasField("finished")]
        assert cached == [32] * 5


def test_a_sequence_is_added_whole() -> None:
    spec = types_pb2.SequenceSpec(
        key=types_pb2.AttemptKey(request_id="r", sample=2),
        token_ids=PROMPT,
        first_index=3,
        sampling=types_pb2.SamplingParams(logit_bias={5: -1.0}, stop_token_ids=[7], min_tokens=0),
        cache_salt=b"s",
        distrust=True,
        banned_sequences=[types_pb2.TokenRun(token_ids=[1, 2])],
        constraint=types_pb2.Constraint(json_object=types_pb2.JsonObject()),
    )
    added = PrefillRequest()
    add_sequence(added.sequence, spec)
    assert added == PrefillRequest(sequence=spec)


async def test_others_wake_one_by_one_and_share_what_is_made_of_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    turns: list[int] = []
    turn = 0
    spec_of = attempt_module._spec_of

    def count_specs(admitted: AdmittedRequest) -> types_pb2.SequenceSpec:
        made.append("spec")
        return spec_of(admitted)

    def script(sequence: Sequence, events: Events) -> None:
        turns.append(turn)
        assert sequence.client_prompt_token_ids == tuple(PROMPT)
        whole_answer(sequence, events)

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(attempt_module, "_spec_of", count_specs)
    async with whole_gateway(monkeypatch) as gateway:
        gateway.script = script
        counting = asyncio.create_task(count_turns())
        responses = await gateway.ask_grpc(request(8))
        counting.cancel()
        assert sorted(tokens_by_sample(responses)) == [*range(8)]
    assert made == ["spec"]
    assert len(set(turns)) == 8, "no two in one turn of the loop"


@pytest.mark.parametrize(("num_free", "host"), [(256, "decode-0"), (3, "decode-1")])
async def test_others_join_the_first_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch, num_free: int, host: str
) -> None:
    """A pair: the prompt is computed where it was, whoever draws the answers."""
    computed_at: list[str] = []

    async def computes(
        channel: object, incarnation: str, request: PrefillRequest, events: Events, _: float
    ) -> None:
        if request.sequence.key.sample == 0:
            load = WorkerLoad(0, 0, (num_free,), {})
            gateway.workers.seen([replace(worker_record("decode-0"), load=load)])
        computed_at.append(incarnation)
        events.put_nowait(Token(0, TOKEN, FinishReason.STOP))

    monkeypatch.setattr(attempt_module, "follow_prefill", computes)
    worker_ids = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    async with whole_gateway(monkeypatch, worker_ids=worker_ids) as gateway:
        gateway.script = lambda sequence, events: None
        sampling = types_pb2.SamplingParams(max_tokens=60, seed=1)
        await gateway.ask_grpc(request(6, sampling=sampling))
        assert len(computed_at) == 6 and len(set(computed_at)) == 1
        assert [worker_id for worker_id, _ in gateway.started] == ["decode-0", *[host] * 5]


async def test_each_sample_recovers_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second loses its worker twice, the others go on; it finds the worker that is left."""

    def script(sequence: Sequence, events: Events) -> None:
        key, index = sequence.key, sequence.first_index
        if key.sample == 1 and key.attempt < 3:
            events.put_nowait(Token(index, 200 + index, None))
            events.put_nowait(Failed(WorkerLost("gone"), None))
        else:
            whole_answer(sequence, events)

    async with whole_gateway(monkeypatch) as gateway:
        gateway.script = script
        responses = await gateway.ask_grpc(request(3))
        assert tokens_by_sample(responses)[1] == [200, 201, 202]
        attempts = {
            response.finished.sample: response.finished.num_attempts
            for response in responses
            if response.HasField("finished")
        }
        assert attempts == {0: 1, 1: 3, 2: 1}
        keys = [sequence.key for _, sequence in gateway.started]
        assert sorted(key.attempt for key in keys if key.sample == 1) == [1, 2, 3]


async def test_a_sample_that_fails_for_good_ends_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = []

    def script(sequence: Sequence, events: Events) -> None:
        events.put_nowait(Token(sequence.first_index, TOKEN, None))
        if sequence.key.sample == 2:
            events.put_nowait(Failed(EngineFailure("broken"), None))

    async with whole_gateway(monkeypatch) as gateway:
        gateway.script = script
        monkeypatch.setattr(
            "tests.unit.gateway.whole_gateway.PlayedWorker.end",
            lambda self, number, key: ended.append(key),
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.ask_grpc(request(3, sampling=types_pb2.SamplingParams(max_tokens=9)))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert {key.sample for key in ended} == {0, 1, 2}


async def test_a_client_that_goes_away_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def script(sequence: Sequence, events: Events) -> None:
        events.put_nowait(Token(0, TOKEN, None))

    async with whole_gateway(monkeypatch) as gateway:
        gateway.script = script
        monkeypatch.setattr(
            "tests.unit.gateway.whole_gateway.PlayedWorker.end",
            lambda self, number, key: ended.append(key),
        )
        asking = asyncio.create_task(gateway.ask_grpc(request(4)))
        while len(gateway.started) < 4:
            await asyncio.sleep(0.01)
        asking.cancel()
        async with asyncio.timeout(30):
            while len(ended) < 4:
                await asyncio.sleep(0.01)
        assert {key.sample for key in ended} == {0, 1, 2, 3}


# Resuming


async def test_a_broken_stream_goes_on_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is complete, the second has begun, the third has nothing: the second computes."""
    received = [[100, 101, 102], [200], []]
    async with whole_gateway(monkeypatch) as gateway:
        gateway.script = whole_answer
        samples = [pb.TokenIds(token_ids=token_ids) for token_ids in received]
        responses = await gateway.ask_grpc(request(3, received_samples=samples))
        assert tokens_by_sample(responses) == {1: [201, 202], 2: [300, 301, 302]}
        assert [sequence.key.sample for _, sequence in gateway.started] == [1, 2]
        assert gateway.started[0][1].emitted_token_ids == (200,)
        finished = {r.finished.sample: r.finished for r in responses if r.HasField("finished")}
        assert [finished[i].num_attempts for i in range(3)] == [0, 1, 1]
        assert {f.usage.num_completion_tokens for f in finished.values()} == {3}


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, f"n is 0; limit: 1 to {MAX_SAMPLES}"),
        ({"n": 129}, f"n is 129; limit: 1 to {MAX_SAMPLES}"),
        ({"n": 2**32 - 1}, f"n is 4294967295; limit: 1 to {MAX_SAMPLES}"),
        (
            {"n": 2, "received_token_ids": [5]},
            "received_token_ids is of one sample, and n is 2; limit: received_samples alone",
        ),
        (
            {"received_token_ids": [5], "received_samples": [pb.TokenIds(token_ids=[5])]},
            "received_token_ids is given twice, by received_samples as well; "
            "limit: received_samples alone",
        ),
        ({"n": 2, "received_samples": [pb.TokenIds()]}, "received_samples has 1; limit: n, 2"),
        (
            {"n": 2, "received_samples": [pb.TokenIds(), pb.TokenIds(token_ids=[5, 1000])]},
            "received_samples[1][1] is 1000; limit: below the vocabulary's size, 1000",
        ),
        (
            {"n": 2, "received_samples": [pb.TokenIds(), pb.TokenIds(token_ids=[5] * 4)]},
            "received_samples[1] has 4 tokens, more than the whole answer; limit: max_tokens, 3",
        ),
        # Two workers of 256 blocks of 16: what the samples need together is 8192 tokens at most.
        (
            {"n": 8, "sampling": types_pb2.SamplingParams(max_tokens=1020)},
            "sampling.max_tokens is 1020, in each of 8 samples, after a prompt of 40; "
            "limit: prompt and all answers together 8192, all block pools",
        ),
    ],
)
async def test_what_is_refused_was_started_nowhere(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    async with whole_gateway(monkeypatch, worker_ids=("both-0", "both-1")) as gateway:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.ask_grpc(request(**fields))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == message
        assert gateway.started == []


async def test_answers_without_a_length_share_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with whole_gateway(monkeypatch) as gateway:
        gateway.script = whole_answer
        sampling = types_pb2.SamplingParams(max_tokens=4000)
        responses = await gateway.ask_grpc(request(100, sampling=sampling, clamp_max_tokens=True))
        tokens = tokens_by_sample(responses)
        assert {len(each) for each in tokens.values()} == {(256 * 16 - len(PROMPT)) // 100}


# HTTP


async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with whole_gateway(monkeypatch) as gateway:
        gateway.script = whole_answer
        body = {"prompt": [[5] * 20, [6] * 30], "n": 3, "max_tokens": 2, "return_token_ids": True}
        answer = json.loads((await gateway.ask_http(body)).body)
        choices = answer["choices"]
        assert [choice["index"] for choice in choices] == [*range(6)]
        ids = [choice["token_ids"] for choice in choices]
        assert ids == 2 * [[100, 101], [200, 201], [300, 301]]
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (50, 12)

        options = {"include_usage": True, "continuous_usage_stats": True}
        streamed = {**body, "stream": True, "stream_options": options}
        *chunks, last, done = events((await gateway.ask_http(streamed)).body)
        assert done == "[DONE]" and last["usage"] == usage and last["choices"] == []
        tokens: dict[int, list[int]] = {}
        reasons = {}
        for chunk in chunks:
            [choice] = chunk["choices"]
            tokens.setdefault(choice["index"], []).extend(choice["token_ids"])
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
                assert chunk["usage"]["completion_tokens"] == 2
                assert chunk["usage"]["prompt_tokens"] == (20 if choice["index"] < 3 else 30)
        assert [tokens[index] for index in range(6)] == ids
        assert reasons == dict.fromkeys(range(6), "length")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 129}, "n"),
        ({"n": 2**70}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"n": 100, "prompt": [[5]] * (MAX_CHOICES // 100 + 1)}, "n"),
        ({"n": 2, "best_of": 2}, "best_of"),
    ],
)
async def test_what_http_refuses(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], param: str
) -> None:
    async with whole_gateway(monkeypatch) as gateway:
        reply = await gateway.ask_http({"prompt": [5, 6], **fields})
        assert (reply.status, reply.error["param"]) == (400, param)
        assert gateway.started == []


# Flow control


async def test_several_streams_wait_for_a_slow_reader() -> None:
    made = [0, 0, 0]

    async def numbers(source: int) -> AsyncGenerator[int, None]:
        for number in range(100):
            made[source] += 1
            yield number

    read: dict[int, list[int]] = {0: [], 1: [], 2: []}
    async for source, number in merged([numbers(0), numbers(1), numbers(2)]):
        await asyncio.sleep(0)
        read[source].append(number)
        assert sum(made) - sum(map(len, read.values())) <= 16 + 3
    assert read == {source: [*range(100)] for source in range(3)}


async def test_an_error_of_one_stream_closes_the_others() -> None:
    closed = []

    async def endless(source: int) -> AsyncGenerator[int, None]:
        try:
            while True:
                await asyncio.sleep(0)
                yield source
        finally:
            closed.append(source)

    async def broken() -> AsyncGenerator[int, None]:
        yield 9
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        async for _ in merged([endless(0), broken(), endless(2)]):
            pass
    assert sorted(closed) == [0, 2]
