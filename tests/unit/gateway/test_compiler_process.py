"""How compilers end, and whose fault it is; with a made-up compiler that does as it is told."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop

from baton.services.gateway import compiler_process, constraints
from baton.services.gateway.constraints import ConstraintChecker
from baton.shared.constraints.size import MAX_BYTES
from baton.shared.rpc.errors import InvalidField, Overloaded
from baton.v1 import types_pb2

COMPILER = """
import os, pathlib, signal, struct, sys, time
sys.path[:0] = {path!r}
from baton.v1 import types_pb2
folder = pathlib.Path({folder!r})
(folder / f"started-{{os.getpid()}}").touch()
def answer():
    sys.stdout.buffer.write(bytes(4))
    sys.stdout.buffer.flush()
answer()
num_before = 0
while head := sys.stdin.buffer.read(4):
    message = sys.stdin.buffer.read(*struct.unpack("<I", head))
    word, _, argument = types_pb2.Constraint.FromString(message).regex.partition(" ")
    with (folder / "asked").open("a") as asked:
        print(word, file=asked)
    if word == "die" or word == "die-unless-fresh" and num_before:
        os.kill(os.getpid(), int(argument))
    elif word == "wait":
        while not (folder / "go").exists():
            time.sleep(0.01)
    num_before += 1
    answer()
"""


class Compilers:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checker = ConstraintChecker(folder, 4096)
        code = COMPILER.format(path=sys.path, folder=str(folder))
        for process in self.checker._processes:
            process._arguments = [sys.executable, "-c", code]

    async def check(self, told: str) -> None:
        async with asyncio.timeout(60):
            await self.checker.check(types_pb2.Constraint(regex=told))

    def begin(self, told: str) -> asyncio.Task[None]:
        return asyncio.create_task(self.check(told))

    async def has_asked(self, word: str) -> None:
        async with asyncio.timeout(60):
            while word not in self.asked:
                await asyncio.sleep(0.01)

    @property
    def asked(self) -> list[str]:
        path = self.folder / "asked"
        return path.read_text().split() if path.exists() else []

    @property
    def pids(self) -> list[int]:
        return [int(path.name.split("-")[1]) for path in self.folder.glob("started-*")]


@pytest_asyncio.fixture
async def compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Compilers]:
    monkeypatch.setattr(constraints, "_NUM_PROCESSES", 1)
    compilers = Compilers(tmp_path)
    yield compilers
    await compilers.checker.close()


@pytest.mark.asyncio
async def test_who_is_next_does_not_pay_for_a_compiler_that_was_ended(compilers: Compilers) -> None:
    await compilers.check("first")
    for number in (signal.SIGKILL, signal.SIGTERM):
        [pid] = compilers.pids
        os.kill(pid, number)
        (compilers.folder / f"started-{pid}").unlink()
        await compilers.check(f"after {number}")


@pytest.mark.asyncio
async def test_what_earlier_constraints_left_behind_is_not_held_against_one(
    compilers: Compilers,
) -> None:
    await compilers.check("first")
    await compilers.check(f"die-unless-fresh {int(signal.SIGABRT)}")
    assert len(compilers.pids) == 2


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("number", "problem", "num_started"),
    [
        (signal.SIGABRT, "the memory", 2),
        (signal.SIGSEGV, "the memory", 2),
        # Time is counted for each: a fresh process has no more of it.
        (signal.SIGXCPU, "too long", 1),
    ],
)
async def test_a_constraint_that_ends_its_compiler_is_known(
    compilers: Compilers, number: signal.Signals, problem: str, num_started: int
) -> None:
    await compilers.check("first")
    for _ in range(2):
        with pytest.raises(InvalidField, match=problem):
            await compilers.check(f"die {int(number)}")
    assert len(compilers.pids) == num_started


@pytest.mark.asyncio
async def test_what_ends_compilers_from_outside_is_no_verdict(compilers: Compilers) -> None:
    for _ in range(2):
        with pytest.raises(Overloaded):
            await compilers.check(f"die {int(signal.SIGKILL)}")
    assert compilers.asked == ["die", "die"] and not compilers.checker._known


@pytest.mark.asyncio
async def test_a_busy_machine_is_no_verdict(
    compilers: Compilers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await compilers.check("first")
    monkeypatch.setattr(compiler_process, "_ANSWER_S", 0.05)
    with pytest.raises(Overloaded, match="later"):
        await compilers.check("wait")
    monkeypatch.undo()
    (compilers.folder / "go").touch()
    await compilers.check("wait")


@pytest.mark.asyncio
async def test_clients_that_go_away_leave_their_compiler_alive(compilers: Compilers) -> None:
    gone = compilers.begin("wait")
    await compilers.has_asked("wait")
    gone.cancel()
    # Of these, the first goes away before it is its turn, and nothing is done for it.
    unborn, next_one = compilers.begin("unborn"), compilers.begin("next")
    await asyncio.sleep(0)
    unborn.cancel()
    await asyncio.gather(gone, unborn, return_exceptions=True)
    (compilers.folder / "go").touch()
    await next_one
    await compilers.check("wait")  # it is known
    assert compilers.asked == ["wait", "next"] and len(compilers.pids) == 1


@pytest.mark.asyncio
async def test_those_who_ask_for_the_same_wait_for_the_same(compilers: Compilers) -> None:
    asking = [compilers.begin("wait") for _ in range(5)]
    await compilers.has_asked("wait")
    asking.pop().cancel()
    (compilers.folder / "go").touch()
    await asyncio.gather(*asking)
    assert compilers.asked == ["wait"]


@pytest.mark.asyncio
async def test_not_without_bound(compilers: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "_MAX_UNDER_WAY", 3)
    asking = [compilers.begin(word) for word in ("wait", "a", "b")]
    await compilers.has_asked("wait")
    with pytest.raises(Overloaded):
        await compilers.check("c")
    # Not one more: it is under way.
    asking.append(compilers.begin("b"))
    (compilers.folder / "go").touch()
    await asyncio.gather(*asking)
    await compilers.check("c")


@pytest.mark.asyncio
async def test_what_is_too_large_is_neither_compiled_nor_kept(compilers: Compilers) -> None:
    for index in range(4):
        with pytest.raises(InvalidField, match=f"limit: {MAX_BYTES} bytes"):
            await compilers.check(f"{index}" + "x" * MAX_BYTES)
    assert not compilers.pids and not compilers.checker._known
    await compilers.check("x" * MAX_BYTES)
    [key] = compilers.checker._known
    assert len(key) == 32


def test_no_handler_of_a_fork_runs() -> None:
    """gRPC's could end the process before it is another program."""
    forks: list[None] = []
    os.register_at_fork(before=lambda: forks.append(None))

    async def start() -> bytes:
        child = await compiler_process._Child.start([sys.executable, "-c", "print('there')"])
        said = await child.reader.read()
        await child.end()
        return said

    assert uvloop.run(start()) == b"there\n"
    assert not forks
