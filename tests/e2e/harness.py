"""A stack of real processes for tests: Valkey, workers and a gateway on loopback.

The processes are started one by one, without the launcher, so that a test can give each its own
flags and failpoints, kill it, and look into it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from baton.shared.directory.embedded import EmbeddedValkey
from baton.shared.kv.drawn import TokenLogprobs
from baton.shared.rpc.convert import logprobs_from_pb
from baton.v1 import (
    inference_service_pb2,
    inference_service_pb2_grpc,
    types_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from tests.device import PATIENCE, ROOT, process_environment
from tests.e2e.forks import Forked, can_fork, fork


@dataclass
class Process:
    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    popen: subprocess.Popen[str] | Forked
    address: str = ""
    addresses: dict[str, str] = field(default_factory=dict)
    """As its READY line names them."""


@dataclass
class Result:
    """One whole answer."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    seed: int = 0
    request_id: str = ""
    num_prompt_tokens: int = 0
    finish_reason: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """From the prompt's second token on."""
    finished: inference_service_pb2.GenerateFinished = field(
        default_factory=inference_service_pb2.GenerateFinished
    )

    @property
    def attempts(self) -> int:
        return self.finished.num_attempts


class Stack:
    """`workers`: name → role; `flags`: for all workers; both ends of a `with` are synchronous.

    `environments`: of processes, by name, beside `process_environment`.
    """

    def __init__(
        self,
        model: Path,
        directory: Path,
        workers: dict[str, str],
        *,
        flags: Sequence[str] = (),
        worker_flags: dict[str, Sequence[str]] | None = None,
        failpoints: dict[str, str] | None = None,
        environments: dict[str, dict[str, str]] | None = None,
        worker_module: str = "baton.services.worker",
    ) -> None:
        self.model = model
        self.directory = directory
        self.trace_dir = directory / "trace"
        self._roles = workers
        self._flags = list(flags)
        self._worker_flags = worker_flags or {}
        self._failpoints = failpoints or {}
        self._environments = environments or {}
        self._worker_module = worker_module
        self._valkey = EmbeddedValkey()
        self.processes: dict[str, Process] = {}
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> Stack:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._valkey.start()
            for name in self._roles:
                self._spawn(name, self._worker_command(name))
            self._spawn("gateway", self._gateway_command())
            for process in self.processes.values():
                self._await_ready(process)
            self._channel = grpc.insecure_channel(self.processes["gateway"].address)
            self.wait_until(lambda: len(self.status().workers) == len(self._roles))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._channel is not None:
            self._channel.close()
        for process in self.processes.values():
            process.popen.kill()
        for process in self.processes.values():
            process.popen.wait()
            if process.popen.stdout is not None:
                process.popen.stdout.close()
        self._valkey.close()
        for pool in Path("/dev/shm").glob(f"baton-test-{os.getpid()}-*"):
            for file in pool.iterdir():
                file.unlink()
            pool.rmdir()

    # Processes

    def spawn_worker(self, name: str, role: str, model: Path, *, is_ready: bool = True) -> Process:
        """One more, of whatever model. `is_ready`: waits for it."""
        self._roles[name] = role
        return self._spawn_more(name, self._worker_command(name, model), is_ready=is_ready)

    def spawn_gateway(self, name: str, model: Path, *, is_ready: bool = True) -> Process:
        return self._spawn_more(name, self._gateway_command(model), is_ready=is_ready)

    def _spawn_more(self, name: str, command: list[str], *, is_ready: bool) -> Process:
        process = self._spawn(name, command)
        if is_ready:
            self._await_ready(process)
        return process

    def _worker_command(self, name: str, model: Path | None = None) -> list[str]:
        shm_dir = Path(f"/dev/shm/baton-test-{os.getpid()}-{id(self):x}")
        shm_dir.mkdir(exist_ok=True)
        return [
            *("-m", self._worker_module, "--role", self._roles[name], "--worker-id", name),
            *("--model", str(model or self.model), "--redis-url", self._valkey.url),
            *("--num-blocks", "512", "--trace-dir", str(self.trace_dir)),
            *("--shm-dir", str(shm_dir), *self._flags, *self._worker_flags.get(name, ())),
        ]

    def _gateway_command(self, model: Path | None = None) -> list[str]:
        return [
            *("-m", "baton.services.gateway", "--model", str(model or self.model)),
            *("--redis-url", self._valkey.url, "--port", "0"),
        ]

    def _spawn(self, name: str, command: list[str]) -> Process:
        environment = process_environment(
            BATON_FAILPOINTS=self._failpoints.get(name, ""), **self._environments.get(name, {})
        )
        log = self.directory / f"{name}.log"
        with log.open("a") as stderr:
            if name in self._roles and can_fork(command, environment):
                popen: subprocess.Popen[str] | Forked = fork(command, environment, stderr)
            else:
                popen = subprocess.Popen(
                    [sys.executable, *command],
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    cwd=ROOT,
                    env=environment,
                )
        process = Process(name, command, environment, log, popen)
        self.processes[name] = process
        return process

    def _await_ready(self, process: Process) -> None:
        assert process.popen.stdout is not None
        line = process.popen.stdout.readline()
        if not line.startswith("READY grpc="):
            raise AssertionError(f"{process.name} did not start:\n{process.log.read_text()}")
        process.addresses = dict(part.split("=", 1) for part in line.split()[1:])
        process.address = process.addresses["grpc"]

    def kill(self, name: str) -> None:
        """SIGKILL; the fault is verified."""
        popen = self.processes[name].popen
        popen.send_signal(signal.SIGKILL)
        assert popen.wait() == -signal.SIGKILL

    def send_signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].popen.send_signal(number)

    def restart(self, name: str, *, keep_failpoints: bool = False) -> None:
        """After kill: the same worker id, a new incarnation."""
        if not keep_failpoints:
            self._failpoints.pop(name, None)
        stdout = self.processes[name].popen.stdout
        if stdout is not None:
            stdout.close()
        self._await_ready(self._spawn(name, self._worker_command(name)))

    @property
    def redis_url(self) -> str:
        return self._valkey.url

    def kill_redis(self) -> None:
        """SIGKILL; the fault is verified."""
        os.kill(self._valkey.pid, signal.SIGKILL)
        self.wait_until(lambda: not self._valkey.is_running())

    def restart_redis(self) -> None:
        """After kill_redis: empty, at the same address."""
        self._valkey.start()

    # Asking

    @property
    def stub(self) -> inference_service_pb2_grpc.InferenceServiceStub:
        assert self._channel is not None
        return inference_service_pb2_grpc.InferenceServiceStub(self._channel)

    def start(
        self,
        prompt: Sequence[int] | str,
        *,
        timeout: float | None = 60.0 * PATIENCE,
        received: Sequence[int] = (),
        n: int | None = None,
        constraint: types_pb2.Constraint | None = None,
        received_samples: Sequence[Sequence[int]] = (),
        stub: inference_service_pb2_grpc.InferenceServiceStub | None = None,
        **sampling: Any,
    ) -> Iterator[inference_service_pb2.GenerateResponse]:
        """The stream of an answer; greedy unless `sampling` says otherwise. `stub`: a client of
        one's own instead of the stack's."""
        fields: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, **sampling}
        params = types_pb2.SamplingParams(**fields)
        request = inference_service_pb2.GenerateRequest(
            sampling=params,
            received_token_ids=received,
            n=n,
            constraint=constraint,
            received_samples=[
                inference_service_pb2.TokenIds(token_ids=sample) for sample in received_samples
            ],
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.token_ids.extend(prompt)
        return (stub or self.stub).Generate(request, timeout=timeout)

    def generate(self, prompt: Sequence[int] | str, **options: Any) -> Result:
        num_received = len(options.get("received", ()))
        return collect(self.start(prompt, **options), num_received=num_received)

    def samples(self, prompt: Sequence[int] | str, *, n: int, **options: Any) -> list[Result]:
        """The `n` answers to one request."""
        return collect_samples(self.start(prompt, n=n, **options), n)

    def generate_at_once(
        self, asks: Sequence[tuple[Sequence[int] | str, dict[str, Any]]]
    ) -> list[Result]:
        """All are sent before any answer is read."""
        streams = [self.start(prompt, **options) for prompt, options in asks]
        return [collect(stream) for stream in streams]

    def status(self) -> inference_service_pb2.GetServerInfoResponse:
        return self.stub.GetServerInfo(inference_service_pb2.GetServerInfoRequest(), timeout=60)

    def state(self, name: str) -> worker_service_pb2.GetWorkerStateResponse:
        """Of a worker, its pool's integrity checked."""
        with grpc.insecure_channel(self.processes[name].address) as channel:
            stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
            request = worker_service_pb2.GetWorkerStateRequest(check_integrity=True)
            state = stub.GetWorkerState(request, timeout=60)
        assert state.integrity_error == ""
        return state

    def trace(self, name: str) -> list[dict[str, object]]:
        """All events of a worker, its restarts included."""
        return [
            json.loads(line)
            for path in sorted(self.trace_dir.glob(f"{name}-*.jsonl"))
            for line in path.read_text().splitlines()
        ]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60.0 * PATIENCE) -> None:
        """For what happens behind the answer's back; fails with the logs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(p.log.read_text()[-3000:] for p in self.processes.values())
                raise AssertionError(f"did not become true in {timeout_s} s\n{logs}")
            time.sleep(0.02)

    def assert_idle(self) -> None:
        """Every block is free again, nothing is claimed, the ledger is empty."""

        def is_idle() -> bool:
            states = [self.state(name) for name in self._roles]
            return all(
                state.num_free_blocks == state.num_blocks
                and not state.num_waiting + state.num_running
                and not state.num_claims + state.num_quarantined_blocks
                for state in states
            ) and not any(count.num_entries for count in self.status().ledger)

        self.wait_until(is_idle)


def collect(
    stream: Iterator[inference_service_pb2.GenerateResponse], *, num_received: int | None = None
) -> Result:
    """Checks what holds for every stream: started first, indices without gaps, finished last."""
    result, kinds, next_index = Result(), [], num_received
    for response in stream:
        kinds.append(response.WhichOneof("message"))
        if kinds[-1] == "started":
            result.seed = response.started.seed
            result.request_id = response.started.request_id
            result.num_prompt_tokens = response.started.num_prompt_tokens
        elif kinds[-1] == "chunk":
            next_index = response.chunk.first_index if next_index is None else next_index
            assert response.chunk.first_index == next_index
            next_index += len(response.chunk.token_ids)
            result.text += response.chunk.text
            result.token_ids += response.chunk.token_ids
            result.logprobs += map(logprobs_from_pb, response.chunk.logprobs)
        elif kinds[-1] == "prompt_logprobs":
            told = response.prompt_logprobs
            assert told.first_position == 1 + len(result.prompt_logprobs) and not result.token_ids
            result.prompt_logprobs += map(logprobs_from_pb, told.tokens)
        else:
            result.finished = response.finished
            result.finish_reason = response.finished.finish_reason
            result.text += response.finished.text
    assert kinds[0] == "started" and kinds[-1] == "finished" and kinds.count("finished") == 1
    return result


def collect_samples(
    stream: Iterator[inference_service_pb2.GenerateResponse], n: int
) -> list[Result]:
    """Of each sample what `collect` says; started once for all, a finished at the very end."""
    started, *responses = stream
    assert started.HasField("started") and responses[-1].HasField("finished")
    by_sample: list[list[inference_service_pb2.GenerateResponse]] = [[started] for _ in range(n)]
    for response in responses:
        told = response.chunk if response.HasField("chunk") else response.finished
        by_sample[told.sample].append(response)
    return [collect(iter(each)) for each in by_sample]
