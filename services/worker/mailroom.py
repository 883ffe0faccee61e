"""Mailroom: the asyncio side of the engine's inbox and outbox.

It is the host that the services see: what they ask goes into the inbox; what the engine says
goes to the stream that it is for. Streams that are gone lose their mail.
"""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import Callable
from itertools import count
from typing import Protocol

from baton.services.decode.server import DecodeEvents
from baton.services.prefill.server import PrefillEvents
from baton.services.worker import messages as msg
from baton.services.worker.directory_sync import DirectorySync
from baton.services.worker.grammars import Grammars
from baton.services.worker.hold import HoldClient
from baton.services.worker.sequence_table import Recipient
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.rpc.convert import key_from_pb, key_to_pb
from baton.shared.rpc.errors import (
    BatonError,
    Draining,
    EngineFailure,
    NoTokenizer,
    StaleAttempt,
    to_failure,
)
from baton.shared.telemetry import NO_TRACE, Trace, log_event
from baton.v1 import decode_service_pb2, kv_service_pb2, types_pb2, worker_service_pb2
from baton.v1.prefill_service_pb2 import PrefillResponse

logger = logging.getLogger(__name__)


def _shutting_down() -> Draining:
    return Draining("the worker is shutting down")


class EngineView(Protocol):
    """What may be asked of the engine from outside its thread."""

    num_steps: int
    is_busy: bool

    def answer_release(self, key: AttemptKey, reader: str) -> kv_service_pb2.HoldResponse: ...


class Mailroom:
    engine: EngineView
    """Set before anything is served; the engine itself is made with this mailroom's outbox."""

    def __init__(
        self,
        *,
        identity: msg.Peer,
        capability_hash: str,
        inbox: queue.SimpleQueue[msg.Command],
        describe_pool: Callable[[], kv_service_pb2.PoolDescription],
        drop_peer: Callable[[str], None],
        directory: DirectorySync,
        grammars: Grammars | None = None,
        trace: Trace = NO_TRACE,
    ) -> None:
        """`grammars`: None where no sequence is constrained."""
        self._trace = trace
        self.identity = identity
        self.capability_hash = capability_hash
        self.describe_pool = describe_pool
        self._drop_peer = drop_peer
        self._inbox = inbox
        self._directory = directory
        self._grammars = grammars
        self._starting: dict[asyncio.Task[None], msg.StartPrefill | msg.StartDecode] = {}
        """Sequences whose constraints are being compiled."""
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self._names = count(1)
        self._prefills: dict[AttemptKey, PrefillEvents] = {}
        self._gateways: dict[str, DecodeEvents] = {}
        self._readers: dict[str, asyncio.Queue[kv_service_pb2.HoldResponse]] = {}
        self._sources: dict[str, HoldClient] = {}

    def tick(self) -> types_pb2.Tick:
        return types_pb2.Tick(step=self.engine.num_steps, busy=self.engine.is_busy)

    # The engine's outbox

    def deliver_from_thread(self, messages: list[msg.Outgoing]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, messages)

    def _deliver(self, messages: list[msg.Outgoing]) -> None:
        for message in messages:
            match message:
                case msg.ToGateway(gateway, response):
                    if gateway in self._gateways:
                        self._gateways[gateway].put_nowait(response)
                case msg.ToPrefillStream(key, event):
                    if key in self._prefills:
                        self._prefills[key].put_nowait(event)
                    if isinstance(event, PrefillResponse) and event.HasField("first_token"):
                        self._trace.emit("first token sent", key=key)
                case msg.ToReader(reader, hold_response):
                    if reader in self._readers:
                        self._readers[reader].put_nowait(hold_response)
                case msg.ToSource(source, hold_request):
                    self._to_source(source, hold_request)
                case msg.SourceForgotten(source):
                    # Pulls asked for since it was lost have connected to it again.
                    if source.incarnation not in self._sources:
                        self._drop_peer(source.incarnation)
                case msg.LedgerWrite(entry):
                    self._directory.write(entry)
                case msg.LedgerEnd(key):
                    self._directory.end(key)
                case msg.LedgerHandedOver(key):
                    self._directory.forget(key)
                case msg.CacheChanged(changes):
                    self._directory.cache_changed(changes)

    # PrefillHost

    def start_prefill(self, sequence: Sequence, *, unclaimed: bool) -> PrefillEvents:
        if sequence.key in self._prefills:
            raise StaleAttempt("this attempt is being computed already")
        events: PrefillEvents = asyncio.Queue()
        self._prefills[sequence.key] = events
        self._start(sequence, msg.StartPrefill(sequence, unclaimed), events.put_nowait)
        return events

    def end_prefill(self, key: AttemptKey, *, cancel: bool) -> None:
        self._prefills.pop(key, None)
        if cancel:
            self.cancel(key)

    # DecodeHost

    def attach_gateway(self, incarnation: str) -> tuple[str, DecodeEvents]:
        name = f"gateway-{incarnation[:8]}-{next(self._names)}"
        self._gateways[name] = asyncio.Queue()
        return name, self._gateways[name]

    def detach_gateway(self, gateway: str) -> None:
        self._gateways.pop(gateway, None)
        for task, start in list(self._starting.items()):
            if isinstance(start, msg.StartDecode) and start.recipient.gateway == gateway:
                task.cancel()
        self._inbox.put(msg.GatewayLost(gateway))

    def start_decode(
        self,
        sequence: Sequence,
        gateway: str,
        number: int,
        source: types_pb2.WorkerAddress | None,
    ) -> None:
        peer = None
        if source is not None:
            peer = msg.Peer(source.worker_id, source.incarnation, source.address)

        def fail(error: BatonError) -> None:
            failed = decode_service_pb2.SequenceFailed(
                slot=number, key=key_to_pb(sequence.key), failure=to_failure(error)
            )
            if gateway in self._gateways:
                self._gateways[gateway].put_nowait(decode_service_pb2.DecodeResponse(failed=failed))

        start = msg.StartDecode(sequence, Recipient(gateway, number), peer)
        self._start(sequence, start, fail)

    def cancel(self, key: AttemptKey) -> None:
        """Also the attempts before it."""
        for task, start in list(self._starting.items()):
            started = start.sequence.key
            if started.sequence == key.sequence and started.attempt <= key.attempt:
                task.cancel()
        self._inbox.put(msg.CancelAttempts(key))

    def _start(
        self,
        sequence: Sequence,
        start: msg.StartPrefill | msg.StartDecode,
        fail: Callable[[BatonError], None],
    ) -> None:
        """At once, or when its constraint is compiled, unless it is cancelled before."""
        self._trace.emit("received", key=sequence.key)
        if self._is_closed or not sequence.constraint:
            self._submit(start, fail)
            return
        task = self._loop.create_task(self._start_constrained(sequence, start, fail))
        self._starting[task] = start
        task.add_done_callback(self._starting.pop)

    async def _start_constrained(
        self,
        sequence: Sequence,
        start: msg.StartPrefill | msg.StartDecode,
        fail: Callable[[BatonError], None],
    ) -> None:
        try:
            if self._grammars is None:
                raise NoTokenizer("constraints are not served here")
            sequence.matcher = await self._grammars.matcher_for(sequence)
        except BatonError as error:
            fail(error)
            return
        except asyncio.CancelledError:
            if self._is_closed:
                fail(_shutting_down())
            raise
        except BaseException:  # a panic of llguidance is no Exception
            log_event(logger, logging.ERROR, "constraint failed", key=sequence.key, exc_info=True)
            fail(EngineFailure("the constraint could not be compiled"))
            return
        self._submit(start, fail)

    def _submit(
        self, start: msg.StartPrefill | msg.StartDecode, fail: Callable[[BatonError], None]
    ) -> None:
        if self._is_closed:
            fail(_shutting_down())
        else:
            self._inbox.put(start)

    # OwnerHost

    def attach_reader(self, name: str) -> tuple[str, asyncio.Queue[kv_service_pb2.HoldResponse]]:
        reader = f"{name}-{next(self._names)}"
        self._readers[reader] = asyncio.Queue()
        return reader, self._readers[reader]

    def from_reader(self, reader: str, message: kv_service_pb2.HoldRequest) -> None:
        if message.HasField("release") and reader in self._readers:
            key = key_from_pb(message.release.key)
            self._readers[reader].put_nowait(self.engine.answer_release(key, reader))
        self._inbox.put(msg.FromReader(reader, message))

    def detach_reader(self, reader: str) -> None:
        self._readers.pop(reader, None)
        self._inbox.put(msg.ReaderLost(reader))

    # The reader's streams

    def _to_source(self, source: msg.Peer, message: kv_service_pb2.HoldRequest) -> None:
        client = self._sources.get(source.incarnation)
        if client is None:
            if not message.HasField("claim"):
                return
            hello = kv_service_pb2.HoldHello(
                worker_id=self.identity.worker_id,
                incarnation=self.identity.incarnation,
                capability_hash=self.capability_hash,
            )
            client = self._sources[source.incarnation] = HoldClient(
                source,
                hello=hello,
                on_message=self._from_source,
                on_lost=self._source_lost,
                tick=self.tick,
            )
        client.send(message)

    def _from_source(self, source: msg.Peer, message: kv_service_pb2.HoldResponse) -> None:
        self._inbox.put(msg.FromSource(source, message))

    def _source_lost(self, source: msg.Peer, error: BatonError) -> None:
        self._sources.pop(source.incarnation, None)
        self._drop_peer(source.incarnation)
        self._inbox.put(msg.SourceGone(source, error))

    # Looking in

    def source_ids(self) -> dict[str, str]:
        """Worker ids of the peers that blocks are read from, by incarnation. From any thread."""
        clients = list(self._sources.items())
        return {incarnation: client.source.worker_id for incarnation, client in clients}

    async def inspect(self, *, check_integrity: bool) -> worker_service_pb2.GetWorkerStateResponse:
        """As of between two steps."""
        reply: asyncio.Future[worker_service_pb2.GetWorkerStateResponse] = (
            self._loop.create_future()
        )

        def take(state: worker_service_pb2.GetWorkerStateResponse) -> None:
            if not reply.done():
                reply.set_result(state)

        def answer(state: worker_service_pb2.GetWorkerStateResponse) -> None:
            self._loop.call_soon_threadsafe(take, state)

        self._inbox.put(msg.Inspect(check_integrity, answer))
        return await reply

    async def close(self) -> None:
        """The engine has stopped: what still comes on open streams is refused here."""
        self._is_closed = True
        if self._grammars is not None:
            self._grammars.close()
        for client in list(self._sources.values()):
            await client.close()
