"""Prompts that wait for room: who is held, who goes next, and that nobody is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from baton.services.gateway.router import LocalPrefill, Role, Route, WorkerSnapshot
from baton.services.gateway.routing import Routing
from baton.services.gateway.served_model import ServedModel
from baton.services.gateway.turns import Turn, Turns
from baton.services.gateway.workers import Workers
from baton.shared.kv.capacity import Capacity, GroupShare
from baton.shared.rpc.errors import InvalidField

LATE_S = 0.5


class Clock:
    now_s = 0.0
    coming_s: Sequence[float] = ()
    """What it shows next, a look each."""

    def monotonic(self) -> float:
        if self.coming_s:
            self.now_s, *self.coming_s = self.coming_s
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(
        "baton.services.gateway.turns.time", SimpleNamespace(monotonic=clock.monotonic)
    )
    return clock


class Pair(Workers):
    """A prefill worker and its partner, known without a directory."""

    roles: tuple[Role, ...] = ("prefill", "both")

    def snapshots(self) -> list[WorkerSnapshot]:
        return [
            WorkerSnapshot(
                worker_id=role,
                incarnation=role,
                address="127.0.0.1:1",
                role=role,
                capability_hash="a",
                capacity=Capacity(16, (100,), (GroupShare(0),), 4096),
                num_free_blocks=(100,),
                num_waiting=0,
                num_running=0,
                num_outstanding_tokens=self.outstanding_tokens[role],
            )
            for role in self.roles
        ]


class Asked:
    """Prompts by name, in the order in which they got their routes."""

    def __init__(self, late_after_s: float | None = LATE_S) -> None:
        self.workers = Pair()
        self.num_looks = 0
        local_prefill = LocalPrefill(1000, 0.5, late_after_s)
        self.routing = Routing(self.workers, ServedModel("m", 1000), self.lookup, local_prefill)
        self.routes: dict[str, Route] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def lookup(self, hashes: list[bytes]) -> None:
        self.num_looks += 1

    async def ask(self, name: str, num_tokens: int = 500, goes_on: bool = False) -> None:
        async def ask() -> None:
            # As of a client that resumes: nobody knows who drew the tokens that it has.
            self.routes[name] = await self.routing.route(
                [7] * num_tokens, 16, None, has_begun=goes_on
            )

        self.tasks[name] = asyncio.create_task(ask())
        await settled()

    async def ended(self, name: str) -> None:
        self.routing.prompt_ended(self.routes[name])
        await settled()

    def where(self) -> dict[str, str]:
        return {name: route.computes_prompt.worker_id for name, route in self.routes.items()}


async def settled() -> None:
    """Nothing here waits for more than another task's turn of the event loop."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def asked(clock: Clock) -> Iterator[Asked]:
    asked = Asked()
    yield asked
    for task in asked.tasks.values():
        task.cancel()


async def test_what_neither_side_may_take_is_held_until_one_has_room(asked: Asked) -> None:
    for name in "abcd":
        await asked.ask(name)
    # 1,000 tokens on the one side, at most half of the queue, with it, on the other.
    assert asked.where() == {"a": "prefill", "b": "prefill", "c": "both"}
    assert asked.routing.num_waiting == 1
    await asked.ended("c")
    assert asked.where()["d"] == "both"
    assert asked.routing.num_waiting == 0


async def test_the_oldest_goes_first_but_the_late_go_last(asked: Asked, clock: Clock) -> None:
    for name in "abc":
        await asked.ask(name)
    for name, at_s in {"old": 0.0, "young": 0.4, "younger": 0.45}.items():
        clock.now_s = at_s
        await asked.ask(name)
    clock.now_s = LATE_S + 0.1
    for name in "abc":
        await asked.ended(name)
    assert list(asked.routes)[3:] == ["young", "younger", "old"]


async def test_a_newcomer_overtakes_nobody_who_is_in_time(asked: Asked, clock: Clock) -> None:
    for name in "abc":
        await asked.ask(name)
    await asked.ask("long", num_tokens=1000)
    # There is room for a short one beside `b`, but the long one is first.
    await asked.ended("a")
    await asked.ask("short", num_tokens=400)
    assert "short" not in asked.routes and "long" not in asked.routes
    clock.now_s = LATE_S + 0.1
    await asked.ask("newcomer", num_tokens=400)
    assert list(asked.routes)[3:] == ["newcomer"]


async def test_who_gives_up_lets_the_next_one_go(asked: Asked) -> None:
    for name in "abc":
        await asked.ask(name)
    await asked.ask("long", num_tokens=1000)
    await asked.ask("next")
    await asked.ended("a")
    assert "next" not in asked.routes
    asked.tasks["long"].cancel()
    await settled()
    assert asked.where()["next"] == "prefill"


async def test_who_becomes_next_while_it_looks_is_not_forgotten(clock: Clock) -> None:
    """The older one turns late between two looks at the clock."""
    turns = Turns(LATE_S)
    older, younger = Turn(turns, since_s=0.0), Turn(turns, since_s=0.3)
    tasks = [asyncio.create_task(older.hold())]
    await settled()
    clock.coming_s = [LATE_S, LATE_S + 0.01]
    tasks.append(asyncio.create_task(younger.hold()))
    await settled()
    assert tasks[1].done()
    tasks[0].cancel()


async def test_a_doubt_about_the_prefill_worker_does_not_send_all_to_its_partner(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        await asked.ask(f"n{number}")
    with_all = asked.workers.snapshots
    monkeypatch.setattr(
        asked.workers,
        "snapshots",
        lambda: [replace(each, suspect=each.role == "prefill") for each in with_all()],
    )
    await asked.ended("n0")
    assert list(asked.where().values()).count("both") == 2
    monkeypatch.setattr(asked.workers, "snapshots", with_all)
    for name in ("n1", "n2"):
        await asked.ended(name)
    assert list(asked.where().values()).count("prefill") == 4
    assert asked.routing.num_waiting == 20 - len(asked.routes)


async def test_when_a_worker_is_back_the_held_look_for_room_one_after_another(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look costs a millisecond of the loop: thousands at once would stop all streams."""
    for number in range(20):
        await asked.ask(f"n{number}")
    asked.num_looks = 0
    with_all = asked.workers.snapshots
    monkeypatch.setattr(
        asked.workers, "snapshots", lambda: [replace(each, suspect=True) for each in with_all()]
    )
    await asked.ended("n0")
    await asked.ask("newcomer")
    assert asked.num_looks == 0 and asked.routing.num_waiting == 18
    monkeypatch.setattr(asked.workers, "snapshots", with_all)
    await asked.ended("n1")
    assert list(asked.routes)[3:] == ["n3", "n4"] and asked.num_looks <= 4


async def test_who_waits_for_another_worker_keeps_nobody_waiting(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pool alone would be large enough, but it is away."""
    for name in "abc":
        await asked.ask(name)
    await asked.ask("large", num_tokens=1000)
    await asked.ask("next")
    with_all = asked.workers.snapshots

    def smaller() -> list[WorkerSnapshot]:
        large, small = (Capacity(16, (count,), (GroupShare(0),), 4096) for count in (100, 40))
        away = WorkerSnapshot("away", "away", "", "both", "a", large, (9,), 0, 0, suspect=True)
        return [*(replace(each, capacity=small) for each in with_all()), away]

    monkeypatch.setattr(asked.workers, "snapshots", smaller)
    await asked.ended("a")
    assert asked.where()["next"] == "prefill"
    assert not asked.tasks["large"].done()


async def test_a_stream_that_goes_on_is_not_held(asked: Asked) -> None:
    for name in "abcd":
        await asked.ask(name)
    await asked.ask("again", goes_on=True)
    assert asked.where() == {"a": "prefill", "b": "prefill", "c": "both", "again": "prefill"}


async def test_what_no_pool_holds_is_refused_though_others_wait(asked: Asked) -> None:
    for name in "abcd":
        await asked.ask(name)
    await asked.ask("huge", num_tokens=5000)
    with pytest.raises(InvalidField):
        await asked.tasks["huge"]
    assert "d" not in asked.routes


async def test_what_no_pair_holds_is_refused_unless_it_has_begun(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill worker takes 4,096 tokens, its partner now 1,000: one that took more was there
    when the answer began, and may come back."""
    with_all = asked.workers.snapshots

    def shorter() -> list[WorkerSnapshot]:
        prefill, both = with_all()
        return [prefill, replace(both, capacity=replace(both.capacity, max_model_len=1000))]

    monkeypatch.setattr(asked.workers, "snapshots", shorter)
    for name, goes_on in (("new", False), ("again", True)):
        await asked.ask(name, num_tokens=985, goes_on=goes_on)
    with pytest.raises(InvalidField, match=r"1001 tokens.*together 1000"):
        await asked.tasks["new"]
    assert not asked.tasks["again"].done()


async def test_without_a_limit_of_lateness_nothing_is_held(clock: Clock) -> None:
    asked = Asked(late_after_s=None)
    for name in "abcdef":
        await asked.ask(name)
    assert len(asked.routes) == 6


async def test_however_many_wait_all_get_their_turn(asked: Asked, clock: Clock) -> None:
    names = [f"n{number}" for number in range(40)]
    for number, name in enumerate(names):
        clock.now_s = number / 10
        await asked.ask(name)
    ended: set[str] = set()
    while len(ended) < len(names):
        name = next(name for name in asked.routes if name not in ended)
        await asked.ended(name)
        ended.add(name)
    assert set(asked.routes) == set(names)
    assert asked.routing.num_waiting == 0
