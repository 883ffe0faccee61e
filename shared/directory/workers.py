"""Who is alive: one record a worker, kept fresh by the worker itself; and whose model it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar, cast, get_args

from baton.shared.directory.cluster_model import ClusterModel, OtherModel
from baton.shared.directory.connection import Command, Connection, DirectoryRefused, Script
from baton.shared.directory.keys import GATEWAY_TTL_S, WORKER_TTL_S, Keys, milliseconds
from baton.shared.kv.capability import Capability
from baton.shared.kv.capacity import Capacity, GroupShare
from baton.shared.telemetry import log_event

log = logging.getLogger(__name__)

Role = Literal["prefill", "decode", "both"]
_SCHEMA = 5
"""One more whenever the record changes, and whenever a request says something new: gateways see no
worker of another schema, and one of an older version would ignore what it does not know."""
_T = TypeVar("_T")

# KEYS  1 the worker's record, 2 the sorted set of workers, 3 the cluster's model
# ARGV  1 worker id, 2 incarnation, 3 record, 4 TTL in ms, 5 digest of the worker's model, 6 its
#       name, 7 its vocabulary
# returns nothing when the record is as written; else the digest, name and vocabulary of the
#       model that the cluster serves instead
PUBLISH = Script("""
local served = redis.call('HMGET', KEYS[3], 'digest', 'name', 'vocab_size')
if served[1] and served[1] ~= ARGV[5] then return served end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], 'incarnation', ARGV[2], 'record', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
if not served[1] then
  redis.call('HSET', KEYS[3], 'digest', ARGV[5], 'name', ARGV[6], 'vocab_size', ARGV[7])
end
redis.call('PEXPIRE', KEYS[3], ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + ARGV[4], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return {}
""")

# KEYS  1 the worker's record, 2 the sorted set of workers, 3 the cluster's model
# ARGV  1 worker id, 2 incarnation
# returns 1 when the record was that incarnation's and is gone now, and with the last one the
#       cluster's model; else 0
REMOVE = Script("""
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[2] then return 0 end
local time = redis.call('TIME')
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', time[1] * 1000 + math.floor(time[2] / 1000))
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('DEL', KEYS[3]) end
return 1
""")

# KEYS  1 the gateway's key
# ARGV  1 TTL in ms
# returns 1
ATTEND = Script("""
redis.call('SET', KEYS[1], '', 'PX', ARGV[1])
return 1
""")

WORKER_SCRIPTS = (PUBLISH, REMOVE, ATTEND)


def accepted_at(place: int) -> str:
    """The counter of drafted tokens at that place of their chain, from 0, that were accepted."""
    return f"num_accepted_at_{place}"


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What changes from heartbeat to heartbeat. `counters` are named as in `WorkerCounters`, and
    accepted drafts by their place in the chain as `accepted_at` says."""

    num_waiting: int
    num_running: int
    num_free_blocks: tuple[int, ...]
    """By block pool."""
    counters: Mapping[str, int]
    prompt_tokens_per_s: int = 0
    """As steps that compute nothing but prompts took; 0: not known yet."""
    path_bytes_per_s: Mapping[str, int] = field(default_factory=dict)
    """Rate of the path to a peer, by its worker id, as it was measured when it was connected."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a gateway needs to know of the model to admit requests for it."""

    model_name: str
    model_type: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    model_impl: str = "baton"
    """Whose code computes it: Baton's, or another library's and its version."""
    files_stamp: str = ""
    """Equal stamps: the very files of this host that this worker read; empty when it is not sure
    (shared/engine/model_digest.py)."""
    drafter: str = ""
    """Who guesses tokens for its decode steps to check; empty: nobody does."""


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    worker_id: str
    """Stable over restarts."""
    incarnation: str
    """Random at every process start; compared for equality only."""
    role: Role
    address: str
    """host:port of the gRPC endpoint."""
    capability: Capability
    model: ModelFacts
    capacity: Capacity
    load: WorkerLoad


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What a gateway reads."""

    model: ClusterModel | None
    """None while no worker is registered."""
    records: list[WorkerRecord]
    refusal: DirectoryRefused | None
    """Why the server takes no writes. Then it says nothing that a worker has no record: it may
    live and be unable to say so."""


class WorkerRegistry:
    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys
        self._complained: set[str] = set()

    async def publish(self, record: WorkerRecord) -> None:
        """Registers, or beats the heart: the record lives `WORKER_TTL_S`.

        Raises `OtherModel`.
        """
        own = model_of(record)
        publish = PUBLISH.call(
            [self._keys.worker(record.worker_id), self._keys.workers, self._keys.model],
            record.worker_id,
            record.incarnation,
            encode_record(record),
            milliseconds(WORKER_TTL_S),
            own.digest,
            own.name,
            own.vocab_size,
        )
        [served] = await self._connection.execute([publish])
        if (other := ClusterModel.from_fields(served)) is not None:
            raise OtherModel(self._keys.cluster, other, str(own))

    async def remove(self, worker_id: str, incarnation: str) -> None:
        """Does nothing when another incarnation is the registered one."""
        keys = [self._keys.worker(worker_id), self._keys.workers, self._keys.model]
        await self._connection.execute([REMOVE.call(keys, worker_id, incarnation)])

    async def view(self, gateway: str) -> ClusterView:
        """All that the gateway of that incarnation needs, in three round trips."""
        refusal = None
        try:
            keys = [self._keys.gateway(gateway)]
            await self._connection.execute([ATTEND.call(keys, milliseconds(GATEWAY_TTL_S))])
        except DirectoryRefused as error:
            refusal = error
        model, worker_ids = await self._connection.execute(
            [self._read_model, ("ZRANGE", self._keys.workers, 0, -1)]
        )
        records = await self._records(worker_ids)
        return ClusterView(ClusterModel.from_fields(model), records, refusal)

    async def model(self) -> ClusterModel | None:
        """None while no worker is registered."""
        [fields] = await self._connection.execute([self._read_model])
        return ClusterModel.from_fields(fields)

    @property
    def _read_model(self) -> Command:
        return ("HMGET", self._keys.model, "digest", "name", "vocab_size")

    async def _records(self, worker_ids: Sequence[str]) -> list[WorkerRecord]:
        texts = await self._connection.execute(
            [("HGET", self._keys.worker(worker_id), "record") for worker_id in worker_ids]
        )
        records = []
        for worker_id, text in sorted(zip(worker_ids, texts, strict=True)):
            if text is not None and (record := self._decode(worker_id, text)) is not None:
                records.append(record)
        self._complained.intersection_update(worker_ids)
        return records

    async def list(self) -> list[WorkerRecord]:
        """All live workers, by id, in two round trips.

        Records that are malformed or of another version are left out and logged once.
        """
        [worker_ids] = await self._connection.execute([("ZRANGE", self._keys.workers, 0, -1)])
        return await self._records(worker_ids)

    def _decode(self, worker_id: str, text: str) -> WorkerRecord | None:
        try:
            record = decode_record(text)
            if record.worker_id != worker_id:
                raise ValueError(f"record is of worker {record.worker_id!r}")
        except ValueError as error:
            if worker_id not in self._complained:
                self._complained.add(worker_id)
                log_event(
                    log, logging.WARNING, "worker left out", worker_id=worker_id, message=error
                )
            return None
        self._complained.discard(worker_id)
        return record


def model_of(record: WorkerRecord) -> ClusterModel:
    # A directory may be called what no UTF-8 is.
    name = record.model.model_name.encode(errors="replace").decode()
    return ClusterModel(record.capability.model_digest, name, record.model.vocab_size)


def encode_record(record: WorkerRecord) -> str:
    return json.dumps({"schema": _SCHEMA, **asdict(record)}, separators=(",", ":"))


def decode_record(text: str) -> WorkerRecord:
    """`ValueError` for anything that `encode_record` of this version would not have written."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(fields, dict) or fields.get("schema") != _SCHEMA:
        raise ValueError(f"not a record of schema {_SCHEMA}")
    capability = _part(fields, "capability")
    model = _part(fields, "model")
    load = _part(fields, "load")
    counters, paths = _part(load, "counters"), _part(load, "path_bytes_per_s")
    capacity = _capacity(_part(fields, "capacity"))
    role = _text(fields, "role")
    if role not in get_args(Role):
        raise ValueError(f"unknown role {role!r}")
    return WorkerRecord(
        worker_id=_text(fields, "worker_id"),
        incarnation=_text(fields, "incarnation"),
        role=cast(Role, role),
        address=_text(fields, "address"),
        capability=Capability(
            model_digest=_text(capability, "model_digest"),
            dtype=_text(capability, "dtype"),
            block_size=_count(capability, "block_size"),
            cache_dtype=_text(capability, "cache_dtype"),
            layout=tuple(_items(capability, "layout", str)),
            determinism=_text(capability, "determinism"),
        ),
        model=ModelFacts(
            model_name=_text(model, "model_name"),
            model_type=_text(model, "model_type"),
            vocab_size=_count(model, "vocab_size"),
            eos_token_ids=tuple(_items(model, "eos_token_ids", int)),
            model_impl=_text(model, "model_impl"),
            files_stamp=_text(model, "files_stamp"),
            drafter=_text(model, "drafter"),
        ),
        capacity=capacity,
        load=WorkerLoad(
            num_waiting=_count(load, "num_waiting"),
            num_running=_count(load, "num_running"),
            num_free_blocks=_num_free_blocks(load, capacity),
            counters={name: _count(counters, name) for name in counters},
            prompt_tokens_per_s=_count(load, "prompt_tokens_per_s"),
            path_bytes_per_s={name: _count(paths, name) for name in paths},
        ),
    )


def _capacity(fields: dict[str, Any]) -> Capacity:
    capacity = Capacity(
        block_size=_count(fields, "block_size"),
        num_blocks=tuple(_items(fields, "num_blocks", int)),
        groups=tuple(
            GroupShare(_count(share, "pool"), _optional_count(share, "max_blocks"))
            for share in _items(fields, "groups", dict)
        ),
        max_model_len=_count(fields, "max_model_len"),
        block_bytes=tuple(_items(fields, "block_bytes", int)),
    )
    num_pools = len(capacity.num_blocks)
    if not capacity.groups or any(share.pool >= num_pools for share in capacity.groups):
        raise ValueError("field groups names a pool that is not there")
    if len(capacity.block_bytes) not in (0, num_pools):
        raise ValueError("field block_bytes has not a size for each pool")
    if capacity.block_size < 1 or min(capacity.num_blocks) < 0:
        raise ValueError("field capacity makes no sense")
    return capacity


def _num_free_blocks(fields: dict[str, Any], capacity: Capacity) -> tuple[int, ...]:
    num_free = tuple(_items(fields, "num_free_blocks", int))
    if len(num_free) != len(capacity.num_blocks) or min(num_free) < 0:
        raise ValueError("field num_free_blocks has not a count for each pool")
    return num_free


def _part(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return _field(fields, name, dict)


def _text(fields: dict[str, Any], name: str) -> str:
    return _field(fields, name, str)


def _count(fields: dict[str, Any], name: str) -> int:
    value = _field(fields, name, int)
    if value < 0:
        raise ValueError(f"field {name} is negative")
    return value


def _optional_count(fields: dict[str, Any], name: str) -> int | None:
    return None if fields.get(name, 0) is None else _count(fields, name)


def _items(fields: dict[str, Any], name: str, kind: type[_T]) -> list[_T]:
    items = _field(fields, name, list)
    if any(type(item) is not kind for item in items):
        raise ValueError(f"field {name} has an item that is no {kind.__name__}")
    return items


def _field(fields: dict[str, Any], name: str, kind: type[_T]) -> _T:
    value = fields.get(name)
    # Not isinstance: true is no count.
    if type(value) is not kind:
        raise ValueError(f"field {name} is missing or no {kind.__name__}")
    return value
