"""Who owns the blocks of which request: one entry for each sequence in flight.

    (nothing) ──► PREFILLING ──► HANDING_OFF ──► DECODING ──► tombstone ──► (nothing)
                       └── an attempt may skip stages, and end in any ──┘

Workers write later than they act, each at its own pace, so writes arrive in any order. An entry
only moves forward in (attempt, stage), where the end of an attempt is its last stage; a later
attempt begins anew, also over a tombstone. So the entry does not depend on the order of arrival, as
long as entry and tombstone live.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from baton.shared.directory.connection import Command, Connection, Script
from baton.shared.directory.keys import LEDGER_TTL_S, TOMBSTONE_TTL_S, Keys, milliseconds
from baton.shared.kv.sequence import AttemptKey

# KEYS  1 the entry
# ARGV  1 attempt, 2 stage, 3 owner's worker id, 4 owner's incarnation, 5 peer's worker id or '',
#       6 number of blocks, 7 TTL in ms
# returns 1 when the entry is as written, 0 when what was there is further on
WRITE = Script("""
local rank = {PREFILLING = 1, HANDING_OFF = 2, DECODING = 3, FINISHED = 4}
local known = redis.call('HMGET', KEYS[1], 'attempt', 'stage')
local known_attempt = tonumber(known[1]) or -1
local known_rank = rank[known[2]] or 0
local attempt = tonumber(ARGV[1])
if attempt < known_attempt then return 0 end
if attempt == known_attempt and rank[ARGV[2]] < known_rank then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'attempt', ARGV[1], 'stage', ARGV[2], 'owner_worker_id', ARGV[3],
  'owner_incarnation', ARGV[4], 'peer_worker_id', ARGV[5], 'num_blocks', ARGV[6],
  'updated_ms', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)))
redis.call('PEXPIRE', KEYS[1], ARGV[7])
return 1
""")

# KEYS  1 the entry
# ARGV  1 attempt, 2 TTL of the tombstone in ms
# returns 1 when the attempt is marked as finished, 0 when a higher one was there
FINISH = Script("""
local known_attempt = tonumber(redis.call('HGET', KEYS[1], 'attempt')) or -1
if tonumber(ARGV[1]) < known_attempt then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'attempt', ARGV[1], 'stage', 'FINISHED')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
""")

LEDGER_SCRIPTS = (WRITE, FINISH)


class Stage(enum.IntEnum):
    """In the order in which an attempt goes through them."""

    PREFILLING = 1
    HANDING_OFF = 2
    DECODING = 3


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    request_id: str
    sample: int
    attempt: int
    stage: Stage
    owner_worker_id: str
    """Who owns the sequence's blocks."""
    owner_incarnation: str
    peer_worker_id: str
    """Who takes them over, or had them before; empty when there is nobody."""
    num_blocks: int


class Ledger:
    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    async def write(self, entries: Sequence[LedgerEntry], finished: Sequence[AttemptKey]) -> None:
        """Writes `entries`, then ends the attempts in `finished`, and lower ones; one round trip.

        What is older than the ledger's entry has no effect. An entry lives `LEDGER_TTL_S` unless
        it is written again. An attempt is finished when no worker computes it any more: a prefill
        worker that has handed its blocks over does not end it.
        """
        commands: list[Command] = [
            WRITE.call(
                [self._keys.ledger(entry.request_id, entry.sample)],
                entry.attempt,
                entry.stage.name,
                entry.owner_worker_id,
                entry.owner_incarnation,
                entry.peer_worker_id,
                entry.num_blocks,
                milliseconds(LEDGER_TTL_S),
            )
            for entry in entries
        ]
        commands += [
            FINISH.call(
                [self._keys.ledger(key.request_id, key.sample)],
                key.attempt,
                milliseconds(TOMBSTONE_TTL_S),
            )
            for key in finished
        ]
        await self._connection.execute(commands)

    async def get(self, request_id: str, sample: int = 0) -> LedgerEntry | None:
        """None for what is finished, unknown or malformed."""
        key = self._keys.ledger(request_id, sample)
        [fields] = await self._connection.execute([("HGETALL", key)])
        try:
            return LedgerEntry(
                request_id=request_id,
                sample=sample,
                attempt=int(fields["attempt"]),
                stage=Stage[fields["stage"]],
                owner_worker_id=fields["owner_worker_id"],
                owner_incarnation=fields["owner_incarnation"],
                peer_worker_id=fields["peer_worker_id"],
                num_blocks=int(fields["num_blocks"]),
            )
        except (KeyError, ValueError):
            return None

    async def count_by_stage(self) -> dict[Stage, int]:
        """Entries in flight. Walks all keys of the server: for operators."""
        counts = dict.fromkeys(Stage, 0)
        async for page in self._connection.scan(self._keys.any_ledger):
            for stage in await self._connection.execute([("HGET", key, "stage") for key in page]):
                if stage in Stage.__members__:
                    counts[Stage[stage]] += 1
        return counts
