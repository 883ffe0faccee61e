"""A request that nobody wants any more gives all of it back, wherever it is.

Every way to end one (cancel, closed connection, killed client, deadline) in every phase. The
phase is proven twice: by the workers' state just before, and by their traces afterwards. Another
answer is under way all the time, and must not be disturbed.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from baton.v1 import inference_service_pb2, inference_service_pb2_grpc, types_pb2
from tests.device import ROOT
from tests.e2e.harness import Stack
from tests.faults.conftest import Oracle, make_prompt
from tests.faults.streams import Background, events

pytestmark = pytest.mark.e2e

logger = logging.getLogger(__name__)

P, D = "prefill-0", "decode-0"
_CHUNK_TOKENS = 32


@pytest.fixture(scope="module")
def stack(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Small pools, short chunks, steps of 50 ms, and half a second for each pull."""
    with Stack(
        tiny_model,
        tmp_path_factory.mktemp("cancel"),
        {P: "prefill", D: "decode"},
        flags=["--num-blocks", "40", "--token-budget", str(_CHUNK_TOKENS)],
        failpoints={P: "slow_steps", D: "slow_steps,slow_pulls"},
    ) as stack:
        yield stack


@dataclass
class Victim:
    request_id: str
    has_tokens: Callable[[], bool]
    end: Callable[[], object]


Request = inference_service_pb2.GenerateRequest
Send = Callable[[Request, float], Victim]
"""Asks, with a deadline in seconds if that is to end it. What takes long has been done before:
phases last for a second or two."""


def cancelled(stack: Stack) -> Send:
    def send(request: Request, _: float) -> Victim:
        call = stack.stub.Generate(request)
        started = next(call).started
        return Victim(started.request_id, lambda: next(call).HasField("chunk"), call.cancel)

    return send


def disconnected(stack: Stack) -> Send:
    # A pool of its own: otherwise gRPC has all channels share one connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.insecure_channel(stack.processes["gateway"].address, options=options)
    grpc.channel_ready_future(channel).result(60)

    def send(request: Request, _: float) -> Victim:
        call = inference_service_pb2_grpc.InferenceServiceStub(channel).Generate(request)
        started = next(call).started
        return Victim(started.request_id, lambda: next(call).HasField("chunk"), channel.close)

    return send


def client_killed(stack: Stack) -> Send:
    gateway = stack.processes["gateway"]
    client = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.client", gateway.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=gateway.environment,
    )
    assert client.stdin is not None and client.stdout is not None
    stdin, stdout = client.stdin, client.stdout
    assert stdout.readline() == "ready\n"

    def kill() -> None:
        client.kill()
        with client:
            client.wait()

    def send(request: Request, _: float) -> Victim:
        stdin.write(request.SerializeToString().hex() + "\n")
        stdin.flush()
        request_id = stdout.readline().strip()
        return Victim(request_id, lambda: stdout.readline() != "", kill)

    return send


def out_of_time(stack: Stack) -> Send:
    def send(request: Request, deadline_s: float) -> Victim:
        call = stack.stub.Generate(request, timeout=deadline_s)
        started = next(call).started

        def wait() -> None:
            with pytest.raises(grpc.RpcError) as failure:
                list(call)
            assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        return Victim(started.request_id, lambda: next(call).HasField("chunk"), wait)

    return send


@dataclass
class Phase:
    """How a request gets into the phase, how that is seen, and what its trace must show."""

    num_bystander_tokens: tuple[int, int]
    """Of the prompt, of the answer."""
    num_prompt_tokens: int
    """Of the request that is ended."""
    deadline_s: float
    """Runs out while the request is in the phase."""
    before: Callable[[Stack], bool]
    """Where the bystander must be when the request comes."""
    is_reached: Callable[[Stack, Victim], bool]
    traced: dict[tuple[str, str], bool]
    """(worker, event) → whether it happened to the request."""


def _num_chunks(stack: Stack, victim: Victim) -> int:
    return len(events(stack, P, "chunk", victim.request_id))


PHASES = {
    # The bystander's 6 blocks leave 34 for one that needs 35; it keeps them while it is pulled.
    "queued": Phase(
        num_bystander_tokens=(3 * _CHUNK_TOKENS, 8),
        num_prompt_tokens=35 * 16,
        deadline_s=0.8,
        before=lambda stack: stack.state(P).num_running == 1,
        is_reached=lambda stack, _: stack.state(P).num_waiting == stack.state(D).num_waiting == 1,
        traced={(P, "admitted"): False, (D, "admitted"): False},
    ),
    "prefilling": Phase(
        num_bystander_tokens=(_CHUNK_TOKENS, 24),
        num_prompt_tokens=38 * 16,
        deadline_s=0.7,
        before=lambda stack: stack.state(D).num_running == 1,
        is_reached=lambda stack, victim: _num_chunks(stack, victim) > 0,
        traced={(P, "chunk"): True, (D, "joined"): False},
    ),
    # The same lack of room, in the decode worker's pool; the prefill worker is done long before.
    "queued for decode": Phase(
        num_bystander_tokens=(_CHUNK_TOKENS, 48),
        num_prompt_tokens=38 * 16,
        deadline_s=1.6,
        before=lambda stack: stack.state(P).num_running == 0 and stack.state(D).num_running == 1,
        is_reached=lambda stack, victim: (
            _num_chunks(stack, victim) == 38 * 16 / _CHUNK_TOKENS
            and stack.state(D).num_waiting == 1
        ),
        traced={(P, "admitted"): True, (D, "admitted"): False},
    ),
    "pulling": Phase(
        num_bystander_tokens=(_CHUNK_TOKENS, 24),
        num_prompt_tokens=4 * _CHUNK_TOKENS,
        deadline_s=1.2,
        before=lambda stack: stack.state(D).num_running == 1,
        is_reached=lambda stack, victim: (
            _num_chunks(stack, victim) == 4 and stack.state(D).num_quarantined_blocks > 0
        ),
        traced={(D, "admitted"): True, (D, "joined"): False},
    ),
    "decoding": Phase(
        num_bystander_tokens=(_CHUNK_TOKENS, 32),
        num_prompt_tokens=_CHUNK_TOKENS,
        deadline_s=1.5,
        before=lambda stack: stack.state(D).num_running == 1,
        # The first token is the prefill worker's.
        is_reached=lambda stack, victim: all(victim.has_tokens() for _ in range(4)),
        traced={(D, "joined"): True},
    ),
}


@pytest.mark.parametrize("end_by", [cancelled, disconnected, client_killed, out_of_time])
@pytest.mark.parametrize("name", PHASES)
def test_what_nobody_wants_is_given_back(
    stack: Stack,
    oracle: Oracle,
    name: str,
    end_by: Callable[[Stack], Send],
) -> None:
    phase, send = PHASES[name], end_by(stack)
    num_prompt, num_answer = phase.num_bystander_tokens
    # Prompts that no other test has: nothing of them is cached.
    prompt = make_prompt(("bystander", name, end_by.__name__), num_prompt)
    bystander = Background(stack, prompt, max_tokens=num_answer)
    stack.wait_until(lambda: phase.before(stack))
    num_aborted = _num_aborted(stack)

    victim = send(_request(name, end_by, phase.num_prompt_tokens), phase.deadline_s)
    if end_by is not out_of_time:
        stack.wait_until(lambda: phase.is_reached(stack, victim))
    ended_at = time.monotonic()
    victim.end()
    if end_by is out_of_time:
        ended_at = time.monotonic()
    # One that decodes has left the prefill worker.
    num_hosts = 1 if name == "decoding" else 2
    stack.wait_until(lambda: _num_aborted(stack) == num_aborted + num_hosts)
    logger.info("%s, %s: freed after %.3f s", name, end_by.__name__, time.monotonic() - ended_at)

    assert bystander.result().token_ids == oracle(prompt, max_tokens=num_answer)
    assert bystander.result().attempts == 1
    stack.assert_idle()
    for (worker, event), has_happened in phase.traced.items():
        assert bool(events(stack, worker, event, victim.request_id)) is has_happened, event
    if name == "prefilling":
        chunks = events(stack, P, "chunk", victim.request_id)
        assert not any(chunk["is_last"] for chunk in chunks)


def _request(name: str, end_by: Callable[[Stack], Send], num_prompt_tokens: int) -> Request:
    prompt = make_prompt(("victim", name, end_by.__name__), num_prompt_tokens)
    return Request(
        token_ids=inference_service_pb2.TokenIds(token_ids=prompt),
        sampling=types_pb2.SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=32),
    )


def _num_aborted(stack: Stack) -> int:
    return sum(stack.state(name).counters.num_aborted for name in (P, D))
