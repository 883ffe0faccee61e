"""How the gateway's streams to workers end: real servers on loopback, scripted workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, cast

import grpc
import pytest

from baton.services.gateway import prefill_calls
from baton.services.gateway.cluster import Cluster
from baton.services.gateway.links import (
    DecodeLink,
    Event,
    Events,
    Failed,
    Joined,
    PromptAdmitted,
    Token,
    follow_prefill,
)
from baton.services.gateway.prefill_calls import PrefillCalls
from baton.services.gateway.router import WorkerSnapshot
from baton.services.gateway.served_model import ServedModel
from baton.shared.kv.capacity import Capacity, GroupShare
from baton.shared.kv.sequence import FinishReason
from baton.shared.model_files.info import ModelInfo
from baton.shared.rpc.errors import (
    BatonError,
    Cancelled,
    ClaimBroken,
    DigestMismatch,
    Draining,
    WorkerLost,
    to_failure,
)
from baton.shared.rpc.serve import INTERNAL_MESSAGE_BYTES, Endpoint, channel_options
from baton.v1 import (
    decode_service_pb2,
    decode_service_pb2_grpc,
    prefill_service_pb2,
    prefill_service_pb2_grpc,
    types_pb2,
)

INCARNATION = "worker-1"
PATIENCE = 60.0
"""No test here is about silence."""

Context = grpc.aio.ServicerContext[Any, Any]
Ending = Callable[["Worker", Context], Awaitable[None]]


async def cancels(worker: Worker, context: Context) -> None:
    await context.abort(grpc.StatusCode.CANCELLED, "of the server's own")


async def breaks(worker: Worker, context: Context) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")


async def drains(worker: Worker, context: Context) -> None:
    raise Draining("the worker is shutting down")


async def returns(worker: Worker, context: Context) -> None:
    """OK, and without what was asked for."""


async def hangs(worker: Worker, context: Context) -> None:
    worker.hanging.set()
    try:
        await asyncio.Event().wait()
    finally:
        worker.let_go.set()


class Worker(
    decode_service_pb2_grpc.DecodeServiceServicer, prefill_service_pb2_grpc.PrefillServiceServicer
):
    """Answers a little, and ends its calls as `ending` does."""

    def __init__(self) -> None:
        self.ending: Ending = hangs
        self.address = ""
        self.num_before_end = 1
        """Sequences that a Decode call waits for."""
        self.failure: BatonError | None = None
        """Of each sequence, once it has joined."""
        self.joins_with_a_token = False
        self.num_calls = 0
        self.hanging, self.let_go = asyncio.Event(), asyncio.Event()

    async def Decode(
        self, request_iterator: AsyncIterator[decode_service_pb2.DecodeRequest], context: Context
    ) -> AsyncIterator[decode_service_pb2.DecodeResponse]:
        self.num_calls += 1
        num_started = 0
        async for message in request_iterator:
            if message.HasField("start"):
                num_started += 1
                slot = message.start.slot
                joined = decode_service_pb2.SequenceJoined(slot=slot, num_cached_tokens=slot)
                if self.joins_with_a_token:
                    step = decode_service_pb2.StepOutput(
                        slots=[slot],
                        indices=[0],
                        token_ids=[7],
                        finish_reasons=[types_pb2.FINISH_REASON_LENGTH],
                        joined=[joined],
                    )
                    yield decode_service_pb2.DecodeResponse(step=step)
                else:
                    yield decode_service_pb2.DecodeResponse(joined=joined)
                if self.failure is not None:
                    failed = decode_service_pb2.SequenceFailed(
                        slot=slot, failure=to_failure(self.failure)
                    )
                    yield decode_service_pb2.DecodeResponse(failed=failed)
            if num_started == self.num_before_end:
                break
        await self.ending(self, context)

    async def Prefill(
        self, request: prefill_service_pb2.PrefillRequest, context: Context
    ) -> AsyncIterator[prefill_service_pb2.PrefillResponse]:
        self.num_calls += 1
        admitted = prefill_service_pb2.PrefillAdmitted(num_cached_tokens=2)
        yield prefill_service_pb2.PrefillResponse(admitted=admitted)
        await self.ending(self, context)
        first = prefill_service_pb2.PrefillFirstToken(token_id=7)
        yield prefill_service_pb2.PrefillResponse(first_token=first)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker()
    endpoint = Endpoint(max_message_bytes=INTERNAL_MESSAGE_BYTES)
    decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(worker, endpoint.server)
    prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server(worker, endpoint.server)
    await endpoint.start("127.0.0.1", 0, [])
    worker.address = endpoint.address
    yield worker
    await endpoint.stop(0)


@pytest.fixture
async def channel(worker: Worker) -> AsyncIterator[grpc.aio.Channel]:
    options = channel_options(INTERNAL_MESSAGE_BYTES)
    async with grpc.aio.insecure_channel(worker.address, options=options) as channel:
        yield channel


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster(
        "redis://unused",
        "test",
        incarnation="g",
        model=cast(ModelInfo, None),
        served=ServedModel("m", 1000),
    )
    yield cluster
    await cluster.close()


def snapshot(address: str) -> WorkerSnapshot:
    return WorkerSnapshot(
        worker_id="decode-0",
        incarnation=INCARNATION,
        address=address,
        role="decode",
        capability_hash="c",
        capacity=Capacity(16, (8,), (GroupShare(0),), 4096),
        num_free_blocks=(8,),
        num_waiting=0,
        num_running=0,
    )


def start(link: DecodeLink) -> Events:
    events: Events = asyncio.Queue()
    link.start(types_pb2.SequenceSpec(), None, events, PATIENCE)
    return events


async def following(events: Events) -> Event:
    async with asyncio.timeout(30):
        return await events.get()


async def the_failure(events: Events) -> Failed:
    """The last event, whatever else came first."""
    while not isinstance(event := await following(events), Failed):
        assert isinstance(event, Joined | PromptAdmitted)
    assert events.empty()
    return event


@pytest.mark.parametrize("ending", [cancels, breaks, returns])
async def test_a_decode_stream_that_ends_fails_its_sequences_and_is_made_anew(
    worker: Worker, cluster: Cluster, ending: Ending
) -> None:
    worker.ending, worker.num_before_end = ending, 2
    broken = cluster.link(snapshot(worker.address))
    for failed in [await the_failure(events) for events in (start(broken), start(broken))]:
        assert isinstance(failed.error, WorkerLost)
        assert failed.worker_incarnation == INCARNATION
    assert broken.num_sequences == 0

    anew = cluster.link(snapshot(worker.address))
    assert anew is not broken and anew is cluster.link(snapshot(worker.address))
    assert isinstance(await following(start(anew)), Joined)
    assert worker.num_calls == 2


async def test_a_decode_stream_that_grpc_cancels_by_itself_is_noticed(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does when the stream of requests breaks. Nobody cancelled the task that reads."""
    lost: list[str] = []
    hello = decode_service_pb2.DecodeHello()
    link = DecodeLink(INCARNATION, worker.address, hello, lost.append)
    events = start(link)
    assert isinstance(await following(events), Joined)

    async def get() -> NoReturn:
        raise RuntimeError("a bug")

    monkeypatch.setattr(link._requests, "get", get)
    assert isinstance((await the_failure(events)).error, WorkerLost)
    assert lost == [INCARNATION]
    await link.close()


@pytest.mark.parametrize(
    ("failure", "doubted", "is_hearsay"),
    [
        (Draining("the worker is shutting down"), INCARNATION, False),
        (DigestMismatch("a block differs"), None, False),
        (ClaimBroken("ended by its owner"), None, True),
    ],
)
async def test_what_a_decode_worker_says_of_one_sequence_is_told_to_its_attempt(
    worker: Worker, cluster: Cluster, failure: BatonError, doubted: str | None, is_hearsay: bool
) -> None:
    worker.failure = failure
    failed = await the_failure(start(cluster.link(snapshot(worker.address))))
    assert type(failed.error) is type(failure) and failed.error.message == failure.message
    assert (failed.worker_incarnation, failed.is_hearsay) == (doubted, is_hearsay)


async def test_a_sequence_joins_before_its_first_token_also_in_one_message(
    worker: Worker, cluster: Cluster
) -> None:
    worker.joins_with_a_token = True
    events = start(cluster.link(snapshot(worker.address)))
    assert await following(events) == Joined(1, None)
    assert await following(events) == Token(0, 7, FinishReason.LENGTH)


async def test_a_decode_link_that_is_closed_says_nothing(worker: Worker) -> None:
    lost: list[str] = []
    hello = decode_service_pb2.DecodeHello()
    link = DecodeLink(INCARNATION, worker.address, hello, lost.append)
    events = start(link)
    assert isinstance(await following(events), Joined)
    await worker.hanging.wait()
    await link.close()
    assert events.empty() and not lost
    await asyncio.wait_for(worker.let_go.wait(), 30)


def following_prefill(calls: PrefillCalls) -> tuple[asyncio.Task[None], Events]:
    events: Events = asyncio.Queue()
    request = prefill_service_pb2.PrefillRequest(sequence=types_pb2.SequenceSpec(first_index=3))
    call = follow_prefill(calls, INCARNATION, request, events, PATIENCE)
    return asyncio.create_task(call), events


async def test_a_prefill_call_brings_its_token(worker: Worker, channel: grpc.aio.Channel) -> None:
    worker.ending = returns
    task, events = following_prefill(PrefillCalls(channel))
    assert await following(events) == PromptAdmitted(2)
    assert await following(events) == Token(3, 7, None)
    await task
    assert events.empty()


async def test_calls_that_are_made_before_there_is_a_prompt_bring_its_token(
    worker: Worker, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.ending = returns
    monkeypatch.setattr(prefill_calls, "_SPARE_AFTER_S", 60.0)
    calls = PrefillCalls(channel)
    calls.fill()
    num_ready = calls.num_spare
    for number in range(num_ready + 1):
        assert calls.num_spare == num_ready - number
        task, events = following_prefill(calls)
        assert await following(events) == PromptAdmitted(2)
        assert await following(events) == Token(3, 7, None)
        await task
    assert worker.num_calls == num_ready + 1, "of a spare call the worker knows no prompt"
    calls.fill()
    assert calls.num_spare == num_ready
    calls.close()
    assert calls.num_spare == 0


async def test_calls_that_are_closed_make_none_any_more(
    channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether filled anew or not since one was taken, nor when one is taken still."""
    monkeypatch.setattr(prefill_calls, "_SPARE_AFTER_S", 0.0)
    for num_fills in (0, 1):
        calls = PrefillCalls(channel)
        calls.take().cancel()
        for _ in range(num_fills):
            calls.fill()
        calls.close()
        await asyncio.sleep(0.01)
        assert calls.num_spare == 0
        calls.take().cancel()
        await asyncio.sleep(0.01)
        assert calls.num_spare == 0


async def test_calls_to_a_worker_that_is_gone_are_not_taken(worker: Worker) -> None:
    worker.ending = returns
    async with grpc.aio.insecure_channel(worker.address) as channel:
        calls = PrefillCalls(channel)
        calls.fill()
        spare = list(calls._spare)
    await asyncio.gather(*(call.code() for call in spare))
    async with grpc.aio.insecure_channel(worker.address) as channel:
        calls._open = PrefillCalls(channel)._open
        task, events = following_prefill(calls)
        assert await following(events) == PromptAdmitted(2)
        await task
        calls.close()


async def mismatches(worker: Worker, context: Context) -> None:
    raise DigestMismatch("a block differs")


async def was_given_up(worker: Worker, context: Context) -> None:
    raise Cancelled("the reader gave its claim up")


@pytest.mark.parametrize(
    ("ending", "error", "doubted"),
    [
        (cancels, WorkerLost, INCARNATION),
        (breaks, WorkerLost, INCARNATION),
        (drains, Draining, INCARNATION),
        (mismatches, DigestMismatch, None),
        (was_given_up, Cancelled, None),
    ],
)
async def test_a_prefill_call_that_fails_is_reported(
    worker: Worker,
    channel: grpc.aio.Channel,
    ending: Ending,
    error: type[Exception],
    doubted: str | None,
) -> None:
    worker.ending = ending
    task, events = following_prefill(PrefillCalls(channel))
    failed = await the_failure(events)
    assert type(failed.error) is error and failed.worker_incarnation == doubted
    assert failed.is_hearsay == (error is Cancelled), "its reader gave the claim up"
    await task


async def test_a_prefill_call_whose_channel_is_closed_is_reported(
    worker: Worker, channel: grpc.aio.Channel
) -> None:
    """As that of a worker which is gone from the directory. Nobody cancelled the task."""
    task, events = following_prefill(PrefillCalls(channel))
    await worker.hanging.wait()
    await channel.close()
    assert isinstance((await the_failure(events)).error, WorkerLost)
    await task
    # And before there is a call.
    task, events = following_prefill(PrefillCalls(channel))
    assert isinstance((await the_failure(events)).error, WorkerLost)
    await task


async def test_a_prefill_call_that_is_cancelled_says_nothing(
    worker: Worker, channel: grpc.aio.Channel
) -> None:
    task, events = following_prefill(PrefillCalls(channel))
    assert await following(events) == PromptAdmitted(2)
    await worker.hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events.empty()
    await asyncio.wait_for(worker.let_go.wait(), 30)
