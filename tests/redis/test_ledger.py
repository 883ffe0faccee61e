from __future__ import annotations

import asyncio
import secrets
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from baton.shared.directory.directory import Directory, open_directory
from baton.shared.directory.embedded import EmbeddedValkey
from baton.shared.directory.keys import LEDGER_TTL_S, TOMBSTONE_TTL_S, Keys
from baton.shared.directory.ledger import LedgerEntry, Stage
from baton.shared.kv.sequence import AttemptKey

pytestmark = pytest.mark.redis


def entry(
    attempt: int = 1, stage: Stage = Stage.PREFILLING, request_id: str = "g:1", sample: int = 0
) -> LedgerEntry:
    return LedgerEntry(request_id, sample, attempt, stage, f"w{attempt}{stage}", "i", "peer", 5)


async def test_entry_comes_back_as_written(directory: Directory) -> None:
    ledger = directory.ledger
    assert await ledger.get("g:1") is None
    await ledger.write([entry(), entry(sample=1, stage=Stage.DECODING)], [])
    assert await ledger.get("g:1") == entry()
    assert await ledger.get("g:1", 1) == entry(sample=1, stage=Stage.DECODING)


async def test_entry_moves_only_forward(directory: Directory) -> None:
    ledger = directory.ledger
    await ledger.write([entry(stage=Stage.DECODING), entry(stage=Stage.HANDING_OFF)], [])
    assert await ledger.get("g:1") == entry(stage=Stage.DECODING)
    await ledger.write([entry(attempt=2), entry(stage=Stage.DECODING)], [])
    assert await ledger.get("g:1") == entry(attempt=2)


async def test_finished_attempt_is_not_resurrected(directory: Directory) -> None:
    ledger = directory.ledger
    await ledger.write([entry(attempt=2)], [AttemptKey("g:1", 0, 2)])
    assert await ledger.get("g:1") is None
    await ledger.write([entry(attempt=2, stage=Stage.DECODING), entry(attempt=1)], [])
    assert await ledger.get("g:1") is None
    await ledger.write([entry(attempt=3)], [])
    assert await ledger.get("g:1") == entry(attempt=3)


async def test_finish_that_overtakes_its_attempt_holds(directory: Directory) -> None:
    await directory.ledger.write([], [AttemptKey("g:1", 0, 1)])
    await directory.ledger.write([entry()], [])
    assert await directory.ledger.get("g:1") is None


async def test_finish_of_a_lower_attempt_does_nothing(directory: Directory) -> None:
    await directory.ledger.write([entry(attempt=2)], [AttemptKey("g:1", 0, 1)])
    assert await directory.ledger.get("g:1") == entry(attempt=2)


async def test_attempts_compare_as_numbers(directory: Directory) -> None:
    await directory.ledger.write([entry(attempt=10), entry(attempt=9)], [])
    assert await directory.ledger.get("g:1") == entry(attempt=10)


async def test_lives_are_bounded(directory: Directory, redis: Redis, cluster: str) -> None:
    key = Keys(cluster).ledger("g:1", 0)
    await directory.ledger.write([entry()], [])
    assert TOMBSTONE_TTL_S * 1000 < await redis.pttl(key) <= LEDGER_TTL_S * 1000
    await directory.ledger.write([], [AttemptKey("g:1", 0, 1)])
    assert 0 < await redis.pttl(key) <= TOMBSTONE_TTL_S * 1000
    await directory.ledger.write([entry(attempt=2)], [])
    assert TOMBSTONE_TTL_S * 1000 < await redis.pttl(key) <= LEDGER_TTL_S * 1000


async def test_writing_again_refreshes(directory: Directory, redis: Redis, cluster: str) -> None:
    key = Keys(cluster).ledger("g:1", 0)
    await directory.ledger.write([entry()], [])
    await redis.pexpire(key, 1000)
    await directory.ledger.write([entry()], [])
    assert await redis.pttl(key) > 1000


async def test_counts_leave_tombstones_out(directory: Directory) -> None:
    # More than one page of a scan.
    entries = [entry(request_id=f"g:{i}", stage=list(Stage)[i % 3]) for i in range(3000)]
    await directory.ledger.write(entries, [])
    await directory.ledger.write([], [AttemptKey(f"g:{i}", 0, 1) for i in range(30)])
    assert await directory.ledger.count_by_stage() == dict.fromkeys(Stage, 990)


class Write(NamedTuple):
    attempt: int
    stage: Stage | None
    """None: the attempt is finished."""

    @property
    def rank(self) -> tuple[int, int]:
        return (self.attempt, self.stage or len(Stage) + 1)


writes = st.builds(Write, st.integers(1, 3), st.sampled_from([*Stage, None]))


@settings(max_examples=150)
@given(batches=st.lists(st.lists(writes, max_size=3), min_size=1, max_size=6))
def test_furthest_write_wins_in_any_order(
    server: EmbeddedValkey, batches: list[list[Write]]
) -> None:
    """The state after any sequence of writes is the furthest of them, and never goes back."""

    async def story() -> None:
        directory = await open_directory(server.url, "property")
        request_id = secrets.token_hex(8)
        furthest = Write(0, None)
        for batch in batches:
            # One call's entries go before its ends.
            await directory.ledger.write(
                [entry(w.attempt, w.stage, request_id) for w in batch if w.stage],
                [AttemptKey(request_id, 0, w.attempt) for w in batch if not w.stage],
            )
            furthest = max([furthest, *batch], key=lambda write: write.rank)
            expected = (
                entry(furthest.attempt, furthest.stage, request_id) if furthest.stage else None
            )
            assert await directory.ledger.get(request_id) == expected
        await directory.aclose()

    asyncio.run(story())


async def test_concurrent_writers_agree(server: EmbeddedValkey, cluster: str) -> None:
    """Two connections race; whoever comes last, the furthest write stands."""
    left, right = (
        await open_directory(server.url, cluster),
        await open_directory(server.url, cluster),
    )
    forward = [entry(attempt, stage) for attempt in (1, 2, 3) for stage in Stage]
    await asyncio.gather(
        *(left.ledger.write([each], []) for each in forward),
        *(right.ledger.write([each], []) for each in reversed(forward)),
    )
    assert await left.ledger.get("g:1") == entry(3, Stage.DECODING)
    await left.aclose()
    await right.aclose()
