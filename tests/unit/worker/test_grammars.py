"""Matchers as a worker makes them: beside the engine, for those who still wait, within bounds."""

from __future__ import annotations

import asyncio
import queue
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from baton.services.worker import messages as msg
from baton.services.worker.directory_sync import DirectorySync
from baton.services.worker.grammars import Grammars
from baton.services.worker.mailroom import Mailroom
from baton.shared.constraints.compiler import Compiler
from baton.shared.constraints.tokens import TokenTable
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.rpc.errors import Draining, InvalidField, NoTokenizer, from_failure
from baton.shared.sampling import SamplingParams
from baton.v1 import kv_service_pb2, types_pb2

DEMO = Path(__file__).parents[3] / "models" / "demo"
AMBIGUOUS = 'start: s\ns: "a" | "b" | "ab" | "aa" | ' + " | ".join("s " * n for n in range(2, 9))


@pytest.fixture(scope="module")
def table() -> TokenTable:
    table = TokenTable.load(DEMO, 4096)
    assert table is not None
    return table


def constrained(
    number: int, constraint: types_pb2.Constraint, emitted: list[int] | None = None
) -> Sequence:
    emitted = emitted or []
    return Sequence(
        AttemptKey(f"r{number}", 0, 1),
        (7, 8, 9, *emitted),
        SamplingParams(max_tokens=1000),
        first_index=len(emitted),
        constraint=constraint.SerializeToString(),
    )


def a_mailroom(grammars: Grammars, inbox: queue.SimpleQueue[msg.Command]) -> Mailroom:
    return Mailroom(
        identity=msg.Peer("w", "i", ""),
        capability_hash="",
        inbox=inbox,
        describe_pool=kv_service_pb2.PoolDescription,
        drop_peer=lambda _: None,
        directory=DirectorySync("redis://127.0.0.1:1", "c", worker_id="w", incarnation="i"),
        grammars=grammars,
    )


async def test_what_was_emitted_is_followed_before_the_engine_sees_it(table: TokenTable) -> None:
    grammars = Grammars(table)
    emitted = table.encode(b'{"a": [1, 2, 3], "b": {"c": "In the beginning"}, "d": ')
    matcher = await grammars.matcher_for(
        constrained(0, types_pb2.Constraint(json_schema="{}"), emitted)
    )
    assert matcher.num_taken == len(emitted)
    grammars.close()


async def test_what_a_client_brings_must_be_the_beginning_of_an_answer(table: TokenTable) -> None:
    grammars = Grammars(table)
    emitted = table.encode(b"{]")
    with pytest.raises(InvalidField, match="received_token_ids have token"):
        await grammars.matcher_for(constrained(0, types_pb2.Constraint(json_schema="{}"), emitted))
    grammars.close()


async def test_an_answer_that_is_too_much_work_to_follow_is_refused(table: TokenTable) -> None:
    """Without masks between its tokens, nothing would bound the work."""
    grammars = Grammars(table)
    [a] = table.encode(b"a")
    with pytest.raises(InvalidField, match="too much work"):
        await grammars.matcher_for(constrained(0, types_pb2.Constraint(lark=AMBIGUOUS), [a] * 400))
    grammars.close()


async def test_tokens_are_read_when_the_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later all its streams would stop meanwhile."""
    loads: list[int] = []
    load = TokenTable.load

    def counted(model_dir: Path, vocab_size: int) -> TokenTable | None:
        loads.append(vocab_size)
        return load(model_dir, vocab_size)

    monkeypatch.setattr(TokenTable, "load", counted)
    grammars = Grammars.load(DEMO, 4096)
    assert loads == [4096]
    await grammars.matcher_for(constrained(0, types_pb2.Constraint(regex="a+")))
    assert loads == [4096]
    grammars.close()


async def test_a_worker_whose_tokens_cannot_be_read_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Panic(BaseException):
        pass

    def panics(model_dir: Path, vocab_size: int) -> TokenTable | None:
        raise Panic

    wanted = constrained(0, types_pb2.Constraint(regex="a+"))
    for grammars in (Grammars.load(tmp_path, 4096), Grammars("none here")):
        with pytest.raises(NoTokenizer):
            await grammars.matcher_for(wanted)
    monkeypatch.setattr(TokenTable, "load", panics)
    with pytest.raises(NoTokenizer):
        await Grammars.load(DEMO, 4096).matcher_for(wanted)


async def test_what_nobody_waits_for_is_not_compiled(
    table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bytes] = []
    compile_ = Compiler.compile

    def counted(self: Compiler, constraint: bytes) -> object:
        compiled.append(constraint)
        return compile_(self, constraint)

    monkeypatch.setattr(Compiler, "compile", counted)
    grammars, inbox = Grammars(table), queue.SimpleQueue[msg.Command]()
    mailroom = a_mailroom(grammars, inbox)
    may_go = threading.Event()
    grammars._thread.submit(may_go.wait)
    one, _ = mailroom.attach_gateway("a" * 32)
    other, _ = mailroom.attach_gateway("b" * 32)
    each = [constrained(n, types_pb2.Constraint(regex=f"a{{{n + 1}}}")) for n in range(4)]
    mailroom.start_decode(each[0], one, 0, None)
    mailroom.start_decode(each[1], other, 1, None)
    mailroom.start_decode(each[2], other, 2, None)
    mailroom.start_prefill(each[3], unclaimed=False)
    await asyncio.sleep(0)
    mailroom.detach_gateway(one)
    mailroom.cancel(each[1].key)
    mailroom.end_prefill(each[3].key, cancel=True)
    await asyncio.sleep(0)
    may_go.set()
    while mailroom._starting:
        await asyncio.sleep(0.001)
    assert compiled == [each[2].constraint]
    told = [inbox.get_nowait() for _ in range(inbox.qsize())]
    assert [type(message) for message in told] == [
        msg.GatewayLost,
        msg.CancelAttempts,
        msg.CancelAttempts,
        msg.StartDecode,
    ]
    await mailroom.close()


async def test_what_comes_when_the_engine_has_stopped_is_refused(table: TokenTable) -> None:
    """On streams that are open still, calls that were made before there was a prompt as well."""
    grammars, inbox = Grammars(table), queue.SimpleQueue[msg.Command]()
    mailroom = a_mailroom(grammars, inbox)
    gateway, decode_events = mailroom.attach_gateway("a" * 32)
    any_constraint = types_pb2.Constraint(regex="a+")
    may_go = threading.Event()
    grammars._thread.submit(may_go.wait)
    starting = mailroom.start_prefill(constrained(0, any_constraint), unclaimed=False)
    await asyncio.sleep(0)
    closing = asyncio.create_task(mailroom.close())
    await asyncio.sleep(0)
    may_go.set()
    await closing
    late = mailroom.start_prefill(constrained(1, any_constraint), unclaimed=False)
    mailroom.start_decode(replace(constrained(2, any_constraint), constraint=b""), gateway, 5, None)
    async with asyncio.timeout(30):
        for events in (starting, late):
            assert isinstance(await events.get(), Draining)
        failed = (await decode_events.get()).failed
    assert failed.slot == 5 and isinstance(from_failure(failed.failure), Draining)
    assert inbox.empty()
