"""Workers and Redis die, or seem to; the streams go on with the tokens of an undisturbed run.

Steps take 50 ms, so that a fault lands where it is meant to; traces and attempts prove that it did.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.shared.directory.directory import open_directory
from tests.e2e.harness import Stack
from tests.faults.conftest import Oracle, make_prompt
from tests.faults.streams import Background, events

pytestmark = pytest.mark.e2e

logger = logging.getLogger(__name__)

GREEDY: dict[str, object] = {"temperature": 0.0}
SEEDED: dict[str, object] = {
    "temperature": 1.0,
    "top_p": 0.95,
    # What was emitted by earlier attempts counts as what this one emits.
    "presence_penalty": 0.5,
    "frequency_penalty": -0.75,
    "repetition_penalty": 1.25,
}
_IN_FLIGHT_S = 0.02
"""Tokens may still arrive so long after their worker's death."""

with_one_worker = pytest.mark.parametrize("stack", [1], indirect=True)
with_two_workers = pytest.mark.parametrize("stack", [2], indirect=True)


@pytest.fixture(scope="module", params=[1, 2], ids=lambda num: f"{num} of each role")
def stack(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    workers = {f"{role}-{n}": role for role in ("prefill", "decode") for n in range(request.param)}
    with Stack(
        tiny_model,
        tmp_path_factory.mktemp("kill"),
        workers,
        flags=["--token-budget", "64"],
        failpoints=dict.fromkeys(workers, "slow_steps"),
    ) as stack:
        yield stack


def test_decode_worker_killed_in_mid_stream(stack: Stack, oracle: Oracle) -> None:
    streams = _streams_that_share(
        stack,
        "decode killed",
        "decode",
        "joined",
        num_prompt=40,
        num_answer=48,
        logprobs=2,
        prompt_logprobs=1,
    )
    victim = _host(stack, "decode", "joined", streams[0])
    stack.wait_until(lambda: all(stream.num_tokens > 4 for stream in streams))
    tokens_before = [stream.num_tokens for stream in streams]

    killed_at = time.monotonic()
    stack.kill(victim)
    if len(_workers(stack, "decode")) == 1:
        stack.restart(victim, keep_failpoints=True)

    for stream, num_before in zip(streams, tokens_before, strict=True):
        result = stream.result()
        assert result.token_ids == oracle(stream.prompt, **stream.sampling)
        was_hit = _host(stack, "decode", "joined", stream) == victim
        assert (result.attempts > 1) is was_hit
        assert not was_hit or num_before < len(result.token_ids) - 4
    _log_pause("decode worker killed", streams[0], killed_at)
    _recover(stack, victim)
    undisturbed = stack.generate_at_once(
        [(stream.prompt, {**stream.sampling, "max_tokens": 16}) for stream in streams]
    )
    for stream, told in zip(streams, undisturbed, strict=True):
        result = stream.result()
        assert result.logprobs[:16] == told.logprobs
        assert result.prompt_logprobs == told.prompt_logprobs
        assert (len(result.prompt_logprobs), len(result.logprobs)) == (39, 48)
        _assert_told_of_the_prompt_once(stack, stream)


def _assert_told_of_the_prompt_once(stack: Stack, stream: Background) -> None:
    """Who computes the prompt again finds it in the cache, for nothing of it is asked any more."""
    admitted = [
        event
        for worker in _workers(stack, "prefill")
        for event in events(stack, worker, "admitted", stream.request_id)
    ]
    for event in admitted:
        # None of the first attempt's may come from a cache; those behind it find what that left.
        if str(event["key"]).endswith("#1"):
            assert event["num_cached_tokens"] == 0
        elif len(_workers(stack, "prefill")) == 1:
            # Of an attempt that ended in between, more.
            assert int(str(event["num_cached_tokens"])) >= 32


@with_two_workers
def test_decode_worker_of_several_samples_killed_in_mid_stream(
    stack: Stack, oracle: Oracle
) -> None:
    """Each sample finds its own way on."""
    sampling: dict[str, Any] = {**SEEDED, "seed": 9, "max_tokens": 40}
    samples = Background(stack, make_prompt("samples", 100), n=3, **sampling)
    victim = _host(stack, "decode", "joined", samples)
    stack.wait_until(lambda: samples.num_tokens > 15)

    stack.kill(victim)

    results = samples.results()
    expected = [oracle(samples.prompt, sample=sample, **sampling) for sample in range(3)]
    assert [result.token_ids for result in results] == expected
    # All were where the first was.
    assert min(result.attempts for result in results) > 1
    _recover(stack, victim)


@with_two_workers
def test_prefill_worker_killed_while_samples_start(stack: Stack, oracle: Oracle) -> None:
    """The first has its first token: it goes on, or not; those that were to find its prompt there
    have it computed elsewhere."""
    sampling: dict[str, Any] = {**SEEDED, "seed": 4, "max_tokens": 12}
    # Of each of the others 12 tokens are left to compute: in two steps of 64.
    samples = Background(stack, make_prompt("samples start", 300), n=10, **sampling)
    victim = _host(stack, "prefill", "admitted", samples)
    stack.wait_until(lambda: samples.num_tokens > 0)

    stack.kill(victim)

    results = samples.results()
    expected = [oracle(samples.prompt, sample=sample, **sampling) for sample in range(10)]
    assert [result.token_ids for result in results] == expected
    assert max(result.attempts for result in results) > 1
    _recover(stack, victim)


@with_two_workers
def test_prefill_worker_killed_before_its_first_token(stack: Stack, oracle: Oracle) -> None:
    streams = _streams_that_share(
        stack, "prefill killed", "prefill", "admitted", num_prompt=1500, num_answer=8
    )
    victim = _host(stack, "prefill", "admitted", streams[0])
    stack.wait_until(lambda: bool(events(stack, victim, "chunk", streams[0].request_id)))

    killed_at = time.monotonic()
    stack.kill(victim)
    hit = [s for s in streams if _host(stack, "prefill", "admitted", s) == victim]
    assert len(hit) >= 2
    assert not any(stream.num_tokens for stream in hit)
    for stream in hit:
        assert not any(c["is_last"] for c in events(stack, victim, "chunk", stream.request_id))

    for stream in streams:
        result = stream.result()
        assert result.token_ids == oracle(stream.prompt, **stream.sampling)
        assert (result.attempts > 1) is (stream in hit)
    _log_pause("prefill worker killed", streams[0], killed_at)
    _recover(stack, victim)


@with_two_workers
def test_stopped_decode_worker_is_replaced_and_does_no_harm_when_it_goes_on(
    stack: Stack, oracle: Oracle
) -> None:
    streams = _streams_that_share(
        stack, "decode stopped", "decode", "joined", num_prompt=40, num_answer=48
    )
    victim = _host(stack, "decode", "joined", streams[0])
    stack.wait_until(lambda: all(stream.num_tokens > 4 for stream in streams))

    stopped_at = time.monotonic()
    stack.send_signal(victim, signal.SIGSTOP)
    try:
        for stream in streams:
            result = stream.result()
            assert result.token_ids == oracle(stream.prompt, **stream.sampling)
            was_hit = _host(stack, "decode", "joined", stream) == victim
            assert (result.attempts > 1) is was_hit
            assert result.finished.decode_worker_id != victim or not was_hit
    finally:
        stack.send_signal(victim, signal.SIGCONT)

    _log_pause("decode worker stopped", streams[0], stopped_at)
    stack.wait_until(lambda: _num_healthy(stack) == len(stack.status().workers) == 4)
    stack.assert_idle()


@with_one_worker
def test_redis_killed_in_mid_stream(stack: Stack, oracle: Oracle) -> None:
    streams = _streams_that_share(
        stack, "redis killed", "decode", "joined", num_prompt=40, num_answer=48
    )
    stack.wait_until(lambda: all(stream.num_tokens > 4 for stream in streams))

    stack.kill_redis()
    assert all(stream.num_tokens < 48 for stream in streams)
    for stream in streams:
        assert stream.result().token_ids == oracle(stream.prompt, **stream.sampling)
        assert stream.result().attempts == 1
    stack.wait_until(lambda: not stack.status().directory_reachable)
    # Longer than records of workers live: what is known stays known.
    time.sleep(3.5)
    late = make_prompt("without a directory", 40)
    assert stack.generate(late, max_tokens=8).token_ids == oracle(late, max_tokens=8)

    stack.restart_redis()
    num_known = set()

    def is_registered_anew() -> bool:
        num_known.add(len(stack.status().workers))
        return asyncio.run(_num_registered(stack.redis_url)) == 2

    stack.wait_until(is_registered_anew)
    stack.wait_until(lambda: stack.status().directory_reachable)
    # An empty directory is no reason to forget workers that live.
    assert num_known == {2}
    again = make_prompt("with a new directory", 40)
    assert stack.generate(again, max_tokens=8).token_ids == oracle(again, max_tokens=8)
    stack.assert_idle()


def _streams_that_share(
    stack: Stack,
    name: str,
    role: str,
    event: str,
    *,
    num_prompt: int,
    num_answer: int,
    **asking: Any,
) -> list[Background]:
    """A greedy answer, and seeded ones until one is on the same worker of that role."""
    greedy: dict[str, Any] = {**GREEDY, **asking}
    streams = [_stream(stack, (name, 0), num_prompt, max_tokens=num_answer, **greedy)]
    host = _host(stack, role, event, streams[0])
    for seed in range(1, 5):
        prompt_name = (name, seed)
        sampling: dict[str, Any] = {**SEEDED, **asking, "seed": seed}
        streams.append(_stream(stack, prompt_name, num_prompt, max_tokens=num_answer, **sampling))
        if _host(stack, role, event, streams[-1]) == host:
            return streams
    raise AssertionError(f"{host} got one answer of {len(streams)}")


def _stream(stack: Stack, name: object, num_prompt: int, **sampling: Any) -> Background:
    return Background(stack, make_prompt(name, num_prompt), **sampling)


def _workers(stack: Stack, role: str) -> list[str]:
    return [name for name in stack.processes if name.startswith(role)]


def _host(stack: Stack, role: str, event: str, stream: Background) -> str:
    """The worker where the event happened to the stream's first attempt, once it has."""
    hosts: list[str] = []

    def is_hosted() -> bool:
        hosts[:] = [
            worker
            for worker in _workers(stack, role)
            for traced in events(stack, worker, event, stream.request_id)
            if str(traced["key"]).endswith("#1")
        ]
        return bool(hosts)

    stack.wait_until(is_hosted)
    return hosts[0]


def _recover(stack: Stack, victim: str) -> None:
    """All workers are there again, and nobody holds anything."""
    if stack.processes[victim].popen.poll() is not None:
        stack.restart(victim, keep_failpoints=True)
    address = stack.processes[victim].address
    stack.wait_until(lambda: address in [w.worker.address for w in stack.status().workers])
    stack.assert_idle()


def _num_healthy(stack: Stack) -> int:
    return sum(worker.healthy for worker in stack.status().workers)


async def _num_registered(redis_url: str) -> int:
    directory = await open_directory(redis_url)
    try:
        return len(await directory.workers.list())
    finally:
        await directory.aclose()


def _log_pause(what: str, stream: Background, since: float) -> None:
    pause_s = next(at for at in stream.token_times if at > since + _IN_FLIGHT_S) - since
    logger.info("%s: next token after %.2f s", what, pause_s)
