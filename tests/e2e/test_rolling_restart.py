"""One of two processes of each role is restarted in turn, under load: no request is lost.

Steps take 50 ms, so that answers run while processes come and go; workers get half a second to
finish, so that of each drain some answers end there and some go on elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import grpc
import pytest

from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc, types_pb2
from tests.device import PATIENCE
from tests.e2e.harness import collect
from tests.e2e.launched import Launched, ask, descendants, is_alive, only_line, wait_for
from tests.e2e.oracle import Ask, Oracle

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

NUM_TOKENS = 24
NUM_GRPC_CLIENTS = 3
DEADLINE_S = 60.0 * PATIENCE
ROLES = ("prefill", "decode", "gateway")
NAMES = [f"{role}-{index}" for role in ROLES for index in range(2)]
RESTARTED = NAMES[::2]


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    expected: list[int]


class Client(ABC):
    """Asks one prompt after the other, over its own connection, until told to stop."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.num_answers = 0
        self.num_extra_attempts = 0
        self.problem: str | None = None
        self._cases = cases
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "a request hangs"

    @abstractmethod
    def answer(self, prompt: list[int]) -> list[int]:
        """Raises what a client would see."""

    @abstractmethod
    def close(self) -> None: ...

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                case = self._cases[self.num_answers % len(self._cases)]
                token_ids = self.answer(case.prompt)
                assert token_ids == case.expected, f"{token_ids} instead of {case.expected}"
                self.num_answers += 1
        except Exception as error:
            self.problem = f"answer {self.num_answers + 1}: {type(error).__name__}: {error}"
        finally:
            self.close()


class GrpcClient(Client):
    def __init__(self, address: str, cases: Sequence[Case]) -> None:
        # A connection of its own, not one shared by all channels of the process.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        super().__init__(cases)

    def answer(self, prompt: list[int]) -> list[int]:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(token_ids=prompt),
            sampling=types_pb2.SamplingParams(
                temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True
            ),
        )
        result = collect(self._stub.Generate(request, timeout=DEADLINE_S))
        self.num_extra_attempts += result.attempts - 1
        return result.token_ids

    def close(self) -> None:
        self._channel.close()


class HttpClient(Client):
    """Keeps its connection as long as the server does."""

    def __init__(self, address: str, cases: Sequence[Case]) -> None:
        self._connection = HTTPConnection(address, timeout=DEADLINE_S)
        super().__init__(cases)

    def answer(self, prompt: list[int]) -> list[int]:
        body = {
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = self._connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, text
        token_ids: list[int] = json.loads(text)["choices"][0]["token_ids"]
        return token_ids

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def launched(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Launched]:
    monkeypatch.setenv("BATON_FAILPOINTS", "slow_steps")
    monkeypatch.setenv("BATON_DRAIN_S", "0.5")
    # A gateway that leaves waits for its clients' connections to grow that old.
    monkeypatch.setenv("BATON_CONNECTION_AGE_S", "2")
    counts = [f"--{role}{s}={2}" for role, s in (("prefill", ""), ("decode", ""), ("gateway", "s"))]
    launched = Launched(
        tmp_path,
        "baton.services.launcher",
        *("up", "--model", str(tiny_model), *counts, "--num-blocks", "512"),
        *("--port", "0", "--http-port", "0", "--drain-s", "30"),
    )
    try:
        yield launched
        # Those that were started again are among them.
        launched.pids()
        launched.process.terminate()
        assert launched.wait_exit() == 0
    finally:
        launched.kill()
        launched.assert_nothing_left()


def test_no_request_is_lost(launched: Launched, tmp_path: Path, oracle: Oracle) -> None:
    addresses = ready(launched)
    wait_for(lambda: all(f"{name} ready at" in launched.stderr for name in NAMES))
    pids = pids_of_all(launched)
    cases = make_cases(oracle)
    grpc_clients = [GrpcClient(addresses["grpc"], cases) for _ in range(NUM_GRPC_CLIENTS)]
    http_client = HttpClient(addresses["http"], cases)
    clients: list[Client] = [*grpc_clients, http_client]

    def has_each_answered_again(before: list[int]) -> bool:
        """Or failed: that is reported at the end."""
        now = [client.num_answers + (client.problem is not None) for client in clients]
        return all(new > old for new, old in zip(now, before, strict=True))

    try:
        wait_for(lambda: has_each_answered_again([0] * len(clients)))
        for name, pid in ((name, pids[name]) for name in RESTARTED):
            before = [client.num_answers for client in clients]
            restart(launched, name, pid)
            wait_for(lambda before=before: has_each_answered_again(before))  # type: ignore[misc]
            assert not [client.problem for client in clients if client.problem], name
    finally:
        for client in clients:
            client.finish()

    assert [client.problem for client in clients] == [None] * len(clients)
    for name in RESTARTED:
        assert f"baton: {name} exited with code 0; starting it again" in launched.stderr
    # Otherwise no drain ended before its answers did, and nothing had to go on elsewhere.
    assert sum(client.num_extra_attempts for client in grpc_clients) > 0

    status = only_line(ask(tmp_path, "status", "--target", addresses["grpc"], "--json").stdout)
    assert status["counters"]["num_digest_mismatches"] == 0


def ready(launched: Launched) -> dict[str, str]:
    """Addresses in the only line of standard output."""
    wait_for(lambda: "\n" in launched.stdout or launched.process.poll() is not None)
    line = launched.stdout.strip()
    assert line.startswith("READY grpc=") and "\n" not in line, launched.stderr
    return dict(part.split("=", 1) for part in line.split()[1:])


def pids_of_all(launched: Launched) -> dict[str, int]:
    """By name. A gateway's command line does not tell its name: they start one after the other."""
    by_name = launched.pids()
    gateways = [
        pid
        for pid in descendants(launched.process.pid)
        if b"baton.services.gateway" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    by_name.update(zip(("gateway-0", "gateway-1"), sorted(gateways, key=_started), strict=True))
    return by_name


def _started(pid: int) -> int:
    """In ticks since the machine's start."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def restart(launched: Launched, name: str, pid: int) -> None:
    """By SIGTERM; the launcher starts it again. Returns when it is ready."""
    num_ready = launched.stderr.count(f"{name} ready at")
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: launched.stderr.count(f"{name} ready at") > num_ready)
    assert not is_alive(pid)


def make_cases(oracle: Oracle) -> list[Case]:
    source = random.Random(7)
    prompts = [[source.randrange(3, 512) for _ in range(length)] for length in (20, 45, 70, 130)]
    return [
        Case(prompt, oracle.answer(Ask(prompt, {"max_tokens": NUM_TOKENS}))) for prompt in prompts
    ]
