"""The worker without an engine: what it sends, and when it waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from baton.services.decode.server import DecodeEvents
from baton.shared.kv.sequence import AttemptKey, FinishReason, SamplingParams, Sequence
from baton.shared.rpc.convert import FINISH_REASON_TO_PB
from baton.v1.decode_service_pb2 import StepOutput
from benchmarks.null_worker import NullEngine

VOCAB_SIZE = 300
FIRST_TOKEN = 256
MAX_UNSENT = 2
LIMIT_S = 10.0
ENDLESS = 1 << 40
LENGTH = FINISH_REASON_TO_PB[FinishReason.LENGTH]
GOING_ON = FINISH_REASON_TO_PB[None]


def sequence(name: str, max_tokens: int, first_index: int = 0) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(AttemptKey(name, 0, 0), (1, 2, 3), params, first_index)


@asynccontextmanager
async def running(engine: NullEngine) -> AsyncIterator[None]:
    task = asyncio.create_task(engine.run())
    try:
        async with asyncio.timeout(LIMIT_S):
            yield
    finally:
        assert not task.done(), "it steps until it is told not to"
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def next_step(events: DecodeEvents) -> StepOutput:
    """The next one, what else is said left out."""
    while (response := await events.get()).WhichOneof("message") != "step":
        pass
    return response.step


async def test_tokens_count_on_and_the_last_one_says_why() -> None:
    engine = NullEngine("hash", VOCAB_SIZE, 0.0)
    name, events = engine.attach_gateway("gateway")
    async with running(engine):
        engine.start_decode(sequence("short", 3), name, 7, None)
        engine.start_decode(sequence("resumed", 50, first_index=42), name, 8, None)
        found: dict[int, list[tuple[int, int, int]]] = {7: [], 8: []}
        while len(found[8]) < 8:
            step = await next_step(events)
            columns = zip(step.indices, step.token_ids, step.finish_reasons, strict=True)
            for slot, column in zip(step.slots, columns, strict=True):
                found[slot].append(column)
    assert found[7] == [(0, 256, GOING_ON), (1, 257, GOING_ON), (2, 258, LENGTH)]
    assert [index for index, _, _ in found[8]] == list(range(42, 50))
    # Through the vocabulary, and then from its beginning.
    span = VOCAB_SIZE - FIRST_TOKEN
    assert [token for _, token, _ in found[8]] == [FIRST_TOKEN + n % span for n in range(42, 50)]
    assert [reason for _, _, reason in found[8]] == [GOING_ON] * 7 + [LENGTH]
    assert events.empty()


async def test_a_cancelled_sequence_ends_and_the_others_do_not() -> None:
    engine = NullEngine("hash", VOCAB_SIZE, 0.0)
    name, events = engine.attach_gateway("gateway")
    one, other = sequence("one", ENDLESS), sequence("other", ENDLESS)
    async with running(engine):
        engine.start_decode(one, name, 1, None)
        engine.start_decode(other, name, 2, None)
        assert list((await next_step(events)).slots) == [1, 2]
        engine.cancel(one.key)
        for _ in range(events.qsize()):
            events.get_nowait()
        assert [list((await next_step(events)).slots) for _ in range(3)] == [[2]] * 3
        assert engine.num_running == 1
        engine.cancel(other.key)
        while engine.num_running:
            await asyncio.sleep(0)
        assert not engine.tick().busy


async def test_a_full_stream_is_waited_for_and_loses_nothing() -> None:
    engine = NullEngine("hash", VOCAB_SIZE, 0.0)
    slow, slow_events = engine.attach_gateway("slow")
    quick, quick_events = engine.attach_gateway("quick")
    async with running(engine):
        engine.start_decode(sequence("slow", ENDLESS), slow, 0, None)
        engine.start_decode(sequence("quick", ENDLESS), quick, 0, None)
        for index in range(20):
            assert list((await next_step(quick_events)).indices) == [index]
            assert slow_events.qsize() <= MAX_UNSENT
        assert [list((await next_step(slow_events)).indices) for _ in range(20)] == [
            [index] for index in range(20)
        ]


async def test_a_gateway_that_left_gets_nothing_more() -> None:
    engine = NullEngine("hash", VOCAB_SIZE, 0.0)
    name, events = engine.attach_gateway("gateway")
    again, again_events = engine.attach_gateway("gateway")
    assert name != again
    async with running(engine):
        for stream in (name, again):
            engine.start_decode(sequence(stream, ENDLESS), stream, 0, None)
        await next_step(events)
        engine.detach_gateway(name)
        num_unsent = events.qsize()
        for _ in range(5):
            await next_step(again_events)
        assert events.qsize() == num_unsent and engine.num_running == 1
