"""What travels between a worker's asyncio thread and its engine thread.

Inbox: asyncio → engine. Outbox: engine → asyncio, delivered once per step. The dialogues with
peers and gateways are carried as the protobuf messages that they are on the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baton.services.worker.sequence_table import Recipient
from baton.shared.directory.ledger import LedgerEntry
from baton.shared.kv.prefix_cache import CacheChanges
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.rpc.errors import BatonError
from baton.shared.transfer.puller import PullResult
from baton.v1 import decode_service_pb2, kv_service_pb2, prefill_service_pb2, worker_service_pb2


@dataclass(frozen=True, slots=True)
class Peer:
    """Another worker, as the gateway named it."""

    worker_id: str
    incarnation: str
    address: str


# Inbox


@dataclass(frozen=True, slots=True)
class StartPrefill:
    sequence: Sequence
    unclaimed: bool


@dataclass(frozen=True, slots=True)
class StartDecode:
    sequence: Sequence
    recipient: Recipient
    source: Peer | None


@dataclass(frozen=True, slots=True)
class CancelAttempts:
    """Ends the key's attempt and lower ones, also if their start comes later."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class GatewayLost:
    gateway: str


@dataclass(frozen=True, slots=True)
class FromReader:
    reader: str
    message: kv_service_pb2.HoldRequest


@dataclass(frozen=True, slots=True)
class ReaderLost:
    reader: str


@dataclass(frozen=True, slots=True)
class FromSource:
    source: Peer
    message: kv_service_pb2.HoldResponse


@dataclass(frozen=True, slots=True)
class SourceGone:
    source: Peer
    error: BatonError


@dataclass(frozen=True, slots=True)
class Pulled:
    result: PullResult


@dataclass(frozen=True, slots=True)
class Inspect:
    check_integrity: bool
    reply: Callable[[worker_service_pb2.GetWorkerStateResponse], None]


@dataclass(frozen=True, slots=True)
class Drain:
    """Takes no new sequence from now on."""


@dataclass(frozen=True, slots=True)
class FailAll:
    """The drain's time is up: what is left goes elsewhere."""

    error: BatonError


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Command = (
    StartPrefill
    | StartDecode
    | CancelAttempts
    | GatewayLost
    | FromReader
    | ReaderLost
    | FromSource
    | SourceGone
    | Pulled
    | Inspect
    | Drain
    | FailAll
    | Stop
)

# Outbox


@dataclass(frozen=True, slots=True)
class ToPrefillStream:
    """An error ends the stream with its status; so does a first token, with OK."""

    key: AttemptKey
    event: prefill_service_pb2.PrefillResponse | BatonError


@dataclass(frozen=True, slots=True)
class ToGateway:
    gateway: str
    message: decode_service_pb2.DecodeResponse


@dataclass(frozen=True, slots=True)
class ToReader:
    reader: str
    message: kv_service_pb2.HoldResponse


@dataclass(frozen=True, slots=True)
class ToSource:
    source: Peer
    message: kv_service_pb2.HoldRequest


@dataclass(frozen=True, slots=True)
class SourceForgotten:
    """No pull from it is asked for any more, but by attempts that claim anew."""

    source: Peer


@dataclass(frozen=True, slots=True)
class LedgerWrite:
    entry: LedgerEntry


@dataclass(frozen=True, slots=True)
class LedgerEnd:
    key: AttemptKey


@dataclass(frozen=True, slots=True)
class LedgerHandedOver:
    """The entry goes on, written by the worker that took the blocks."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class CacheChanged:
    changes: CacheChanges


Outgoing = (
    ToPrefillStream
    | ToGateway
    | ToReader
    | ToSource
    | SourceForgotten
    | LedgerWrite
    | LedgerEnd
    | LedgerHandedOver
    | CacheChanged
)
