"""DirectorySync against a directory that comes and goes: nothing lost, nothing resurrected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from baton.services.worker import directory_sync
from baton.services.worker.directory_sync import DirectorySync
from baton.shared.directory.cluster_model import ClusterModel
from baton.shared.directory.directory import Directory, DirectoryUnavailable, OtherModel
from baton.shared.directory.ledger import LedgerEntry, Stage
from baton.shared.directory.workers import WorkerRecord
from baton.shared.kv.prefix_cache import CacheChanges
from baton.shared.kv.sequence import AttemptKey

RECORD = cast(WorkerRecord, "the worker as it is now")
A, B, C = (letter.encode() * 32 for letter in "abc")


class FakeDirectory:
    """What the calls would leave in Redis, as long as it is there; all three parts in one."""

    def __init__(self) -> None:
        self.is_away = False
        self.num_calls = self.num_writes = 0
        """That were begun."""
        self.num_published = 0
        self.registered: list[WorkerRecord] = []
        self.entries: dict[tuple[str, int], LedgerEntry] = {}
        self.prefixes: set[bytes] = set()
        self.writes: list[list[LedgerEntry]] = []
        self.held_back: asyncio.Event | None = None
        """When set, calls wait for it."""
        self.age = 100
        self.other_model: ClusterModel | None = None
        """Of workers that are there."""
        self.workers = self.prefix_index = self.ledger = self

    async def _arrive(self) -> None:
        self.num_calls += 1
        if self.held_back is not None:
            await self.held_back.wait()
        if self.is_away:
            raise DirectoryUnavailable("away")

    async def publish(self, *record: Any, **prefixes: Sequence[bytes]) -> None:
        await self._arrive()
        if prefixes:
            self.prefixes |= set(prefixes["added"])
            self.prefixes -= set(prefixes["removed"])
        elif self.other_model is not None:
            raise OtherModel("default", self.other_model, "mine")
        else:
            self.num_published += 1
            self.registered = list(record)

    async def model(self) -> ClusterModel | None:
        await self._arrive()
        return self.other_model or None

    async def age_s(self) -> int:
        return self.age

    async def remove(self, worker_id: str, incarnation: str) -> None:
        await self._arrive()
        self.registered = []

    async def write(self, entries: Sequence[LedgerEntry], finished: Sequence[AttemptKey]) -> None:
        self.num_writes += 1
        await self._arrive()
        self.writes.append(list(entries))
        for entry in entries:
            self.entries[entry.request_id, entry.sample] = entry
        for key in finished:
            entry_there = self.entries.get(key.sequence)
            if entry_there is not None and entry_there.attempt <= key.attempt:
                del self.entries[key.sequence]

    async def aclose(self) -> None:
        pass

    def forget_everything(self) -> None:
        """As a server does that is restarted empty."""
        self.registered, self.entries, self.prefixes = [], {}, set()


def entry(attempt: int = 1, stage: Stage = Stage.PREFILLING, name: str = "r") -> LedgerEntry:
    return LedgerEntry(name, 0, attempt, stage, "me", "ab", "", 3)


def key(attempt: int = 1, name: str = "r") -> AttemptKey:
    return AttemptKey(name, 0, attempt)


def changes(added: list[bytes], removed: list[bytes]) -> CacheChanges:
    return CacheChanges(dict.fromkeys(added), dict.fromkeys(removed))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDirectory:
    """Opened instead of the real one; everything periodic comes soon."""
    fake = FakeDirectory()

    async def open_fake(url: str, cluster: str) -> Directory:
        await fake._arrive()
        return cast(Directory, fake)

    monkeypatch.setattr(directory_sync, "open_directory", open_fake)
    monkeypatch.setattr(directory_sync, "_FLUSH_S", 0.001)
    monkeypatch.setattr(directory_sync, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(directory_sync, "_LEDGER_REFRESH_S", 0.02)
    monkeypatch.setattr(directory_sync, "_PREFIX_REFRESH_S", 0.02)
    monkeypatch.setattr(directory_sync, "_PATIENCE_S", 0.1)
    return fake


@asynccontextmanager
async def running() -> AsyncIterator[DirectorySync]:
    async def make_record() -> WorkerRecord:
        return RECORD

    sync = DirectorySync("redis://nowhere", "default", worker_id="me", incarnation="ab")
    task = asyncio.create_task(sync.run(make_record))
    yield sync
    assert not task.done(), "it goes on whatever the directory does"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def tries(fake: FakeDirectory, num_tries: int = 5) -> None:
    """Time for what it must not do, or cannot while the directory is away."""
    end = fake.num_calls + num_tries
    await until(lambda: fake.num_calls >= end)


async def rounds(fake: FakeDirectory, num_rounds: int = 5) -> None:
    """Time for every refresh to come round."""
    end = fake.num_published + num_rounds
    await until(lambda: fake.num_published >= end)


async def test_what_the_engine_says_arrives(fake: FakeDirectory) -> None:
    async with running() as sync:
        sync.write(entry())
        sync.cache_changed(changes([A, B], []))
        await until(lambda: bool(fake.entries) and fake.prefixes == {A, B})
        assert fake.registered == [RECORD]
        sync.write(entry(stage=Stage.DECODING))
        sync.cache_changed(changes([C], [A]))
        await until(lambda: fake.prefixes == {B, C})
        await until(lambda: fake.entries["r", 0].stage is Stage.DECODING)


async def test_only_the_latest_of_an_entry_is_written(fake: FakeDirectory) -> None:
    async with running() as sync:
        await rounds(fake, 1)
        for stage in Stage:
            sync.write(entry(stage=stage))
        await until(lambda: bool(fake.writes))
        assert [each.stage for each in fake.writes[0]] == [Stage.DECODING]


async def test_entries_live_on_and_end_for_good(fake: FakeDirectory) -> None:
    async with running() as sync:
        sync.write(entry())
        await until(lambda: bool(fake.entries))
        fake.forget_everything()
        await until(lambda: bool(fake.entries))
        sync.end(key())
        await until(lambda: not fake.entries)
        await rounds(fake)
        assert not fake.entries, "a refresh brought it back"


async def test_an_entry_that_another_worker_goes_on_with_is_not_refreshed(
    fake: FakeDirectory,
) -> None:
    async with running() as sync:
        sync.write(entry())
        await until(lambda: bool(fake.entries))
        sync.forget(key())
        await rounds(fake)
        fake.forget_everything()
        await rounds(fake)
        assert not fake.entries


async def test_the_end_of_an_old_attempt_leaves_the_new_one(fake: FakeDirectory) -> None:
    async with running() as sync:
        sync.write(entry(1))
        sync.write(entry(2))
        sync.end(key(1))
        sync.forget(key(1))
        await rounds(fake)
        assert fake.entries["r", 0].attempt == 2


async def test_what_was_said_while_it_was_away_is_said_when_it_is_back(
    fake: FakeDirectory,
) -> None:
    async with running() as sync:
        sync.write(entry(name="ends"))
        sync.write(entry(name="goes on"))
        sync.cache_changed(changes([A, B], []))
        await until(lambda: len(fake.entries) == 2 and fake.prefixes == {A, B})
        fake.is_away = True
        await tries(fake)
        sync.end(key(name="ends"))
        sync.write(entry(name="new"))
        sync.cache_changed(changes([C], [A]))
        await tries(fake)
        fake.is_away = False
        await until(lambda: {name for name, _ in fake.entries} == {"goes on", "new"})
        await until(lambda: fake.prefixes == {B, C})


async def test_a_directory_that_lost_everything_is_told_everything(
    fake: FakeDirectory,
) -> None:
    async with running() as sync:
        sync.write(entry())
        sync.cache_changed(changes([A, B], []))
        await until(lambda: bool(fake.entries) and fake.prefixes == {A, B})
        fake.is_away = True
        await tries(fake)
        fake.forget_everything()
        fake.is_away = False
        await until(lambda: bool(fake.entries) and fake.prefixes == {A, B})
        assert fake.registered == [RECORD]


async def test_it_may_be_away_from_the_start(fake: FakeDirectory) -> None:
    fake.is_away = True
    async with running() as sync:
        sync.write(entry())
        sync.cache_changed(changes([A], []))
        await tries(fake)
        fake.is_away = False
        await until(lambda: bool(fake.entries) and fake.prefixes == {A})


async def test_what_changes_during_a_write_is_not_taken_for_written(
    fake: FakeDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_sync, "_LEDGER_REFRESH_S", 1000.0)
    async with running() as sync:
        await rounds(fake, 1)
        fake.held_back, num_before = asyncio.Event(), fake.num_writes
        sync.write(entry())
        await until(lambda: fake.num_writes > num_before)
        sync.write(entry(stage=Stage.DECODING))
        sync.write(entry(name="other"))
        fake.held_back.set()
        await until(lambda: len(fake.entries) == 2)
        await until(lambda: fake.entries["r", 0].stage is Stage.DECODING)


async def test_an_end_during_a_write_is_kept(fake: FakeDirectory) -> None:
    async with running() as sync:
        await rounds(fake, 1)
        fake.held_back, num_before = asyncio.Event(), fake.num_writes
        sync.write(entry())
        await until(lambda: fake.num_writes > num_before)
        sync.end(key())
        fake.held_back.set()
        await rounds(fake)
        assert not fake.entries


async def test_a_prefix_that_goes_and_comes_during_a_failed_publish_is_listed(
    fake: FakeDirectory,
) -> None:
    async with running() as sync:
        sync.cache_changed(changes([A], []))
        await until(lambda: fake.prefixes == {A})
        fake.is_away = True
        sync.cache_changed(changes([], [A]))
        await tries(fake)
        sync.cache_changed(changes([A], []))
        fake.is_away = False
        await rounds(fake)
        assert fake.prefixes == {A}


async def test_a_removed_prefix_whose_publish_failed_is_removed_later(
    fake: FakeDirectory,
) -> None:
    async with running() as sync:
        sync.cache_changed(changes([A, B], []))
        await until(lambda: fake.prefixes == {A, B})
        fake.is_away = True
        sync.cache_changed(changes([], [A]))
        await tries(fake)
        fake.is_away = False
        await until(lambda: fake.prefixes == {B})


async def test_a_retired_worker_is_not_registered_again_but_its_ledger_goes_on(
    fake: FakeDirectory,
) -> None:
    async with running() as sync:
        await rounds(fake, 1)
        await sync.retire()
        sync.write(entry())
        await until(lambda: bool(fake.entries))
        await tries(fake)
        assert not fake.registered
        sync.end(key())
        await until(lambda: not fake.entries)


async def test_retiring_while_it_is_away_is_no_error(fake: FakeDirectory) -> None:
    async with running() as sync:
        await rounds(fake, 1)
        fake.is_away = True
        await sync.retire()


async def test_a_heartbeat_under_way_does_not_put_a_retired_worker_back(
    fake: FakeDirectory,
) -> None:
    snapshot, asked = asyncio.Event(), asyncio.Event()

    async def make_record() -> WorkerRecord:
        if fake.num_published:
            asked.set()
            await snapshot.wait()
        return RECORD

    sync = DirectorySync("redis://nowhere", "default", worker_id="me", incarnation="ab")
    task = asyncio.create_task(sync.run(make_record))
    await asked.wait()
    retiring = asyncio.create_task(sync.retire())
    # As far as it goes before the engine has answered.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    snapshot.set()
    await retiring
    sync.write(entry())
    await until(lambda: bool(fake.entries))
    assert not fake.registered
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


OTHER = ClusterModel("o" * 64, "other", 512)


async def make_record() -> WorkerRecord:
    return RECORD


def new_sync() -> DirectorySync:
    return DirectorySync("redis://nowhere", "default", worker_id="me", incarnation="ab")


async def test_workers_of_another_model_that_were_killed_are_waited_for(
    fake: FakeDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_sync, "_PATIENCE_S", 60.0)
    fake.other_model = OTHER
    async with running() as sync:
        await tries(fake)
        assert not sync.has_tried.is_set() and not fake.registered
        fake.other_model = None
        await until(sync.has_tried.is_set)
        assert fake.registered == [RECORD]


async def test_workers_of_another_model_that_live_on_refuse_a_new_one(fake: FakeDirectory) -> None:
    fake.other_model = OTHER
    sync = new_sync()
    with pytest.raises(OtherModel, match="'other' .digest ooo.*mine"):
        await sync.run(make_record)
    assert not sync.has_tried.is_set()
    with pytest.raises(OtherModel, match="'other' .digest ooo.*'mine' .digest mmm"):
        await directory_sync.check_model("u", "default", name="mine", digest="m" * 64)


async def test_a_registered_worker_ends_when_another_model_has_taken_over(
    fake: FakeDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_sync, "_PATIENCE_S", 60.0)
    sync = new_sync()
    task = asyncio.create_task(sync.run(make_record))
    await until(lambda: bool(fake.registered))
    fake.other_model = OTHER
    with pytest.raises(OtherModel):
        async with asyncio.timeout(60):
            await task


async def test_in_an_empty_directory_that_has_just_started_others_come_first(
    fake: FakeDirectory,
) -> None:
    """It may have lost what it knew. Who was registered before says so again at once."""
    fake.age = 0
    async with running() as new, running() as known:
        known._has_joined = True
        await until(known.has_tried.is_set)
        await tries(fake)
        assert not new.has_tried.is_set()
        fake.age = directory_sync._SETTLED_S
        await until(new.has_tried.is_set)


async def test_a_directory_that_is_away_keeps_no_worker_from_starting(fake: FakeDirectory) -> None:
    fake.is_away = True
    await directory_sync.check_model("u", "default", name="mine", digest="m" * 64)
    async with running() as sync:
        await until(sync.has_tried.is_set)
