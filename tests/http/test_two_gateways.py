"""Two gateways behind the same ports: one leaves under load, and nobody notices."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import grpc
import pytest

from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc, types_pb2
from tests.device import PATIENCE, ROOT, process_environment
from tests.e2e.launched import descendants
from tests.unit.gateway.null_frontend import ask

pytestmark = pytest.mark.e2e

_REQUEST = pb.GenerateRequest(
    text="In the beginning", sampling=types_pb2.SamplingParams(temperature=0, max_tokens=8)
)
_BODY = {"prompt": "In the beginning", "temperature": 0, "max_tokens": 8}


class Launcher:
    def __init__(self, process: subprocess.Popen[str], addresses: dict[str, str]) -> None:
        self.process = process
        self.addresses = addresses

    def gateways(self) -> set[int]:
        roles = descendants(self.process.pid)
        return {pid for pid in roles if b"\0baton.services.gateway\0" in _command(pid)}


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    scratch = tmp_path_factory.mktemp("launcher")
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "baton.services.launcher", "up", "--model", "models/demo"),
            *("--port", "0", "--http-port", "0", "--gateways", "2", "--both", "1"),
        ],
        cwd=ROOT,
        env=process_environment(BATON_CONNECTION_AGE_S="1", TMPDIR=str(scratch)),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("READY ")
            yield Launcher(process, dict(part.split("=", 1) for part in line.split()[1:]))
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait()
    assert code == 0


async def test_a_gateway_leaves_under_load_and_no_request_fails(launcher: Launcher) -> None:
    before = launcher.gateways()
    assert len(before) == 2
    enough = asyncio.Event()
    num_answers = {"grpc": 0, "http": 0}

    async def keep_asking(door: str, answer: Callable[[], Awaitable[str]]) -> None:
        expected = await answer()
        while not enough.is_set():
            assert await answer() == expected
            num_answers[door] += 1

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60 * PATIENCE):
            while not condition():
                assert not any(task.done() for task in clients), [*clients]
                await asyncio.sleep(0.05)

    # Channels of their own: several of one process share a connection otherwise.
    own = [("grpc.use_local_subchannel_pool", 1)]
    target = launcher.addresses["grpc"]
    async with (
        grpc.aio.insecure_channel(target, options=own) as first,
        grpc.aio.insecure_channel(target, options=own) as second,
    ):
        clients = [
            asyncio.create_task(keep_asking("grpc", lambda: _over_grpc(first))),
            asyncio.create_task(keep_asking("grpc", lambda: _over_grpc(second))),
            asyncio.create_task(keep_asking("http", lambda: _over_http(launcher))),
        ]
        await until(lambda: min(num_answers.values()) >= 3)
        leaver = min(before)
        os.kill(leaver, signal.SIGTERM)
        await until(lambda: leaver not in launcher.gateways())
        await until(lambda: len(launcher.gateways()) == 2)
        answered = dict(num_answers)
        await until(lambda: all(num_answers[door] >= answered[door] + 3 for door in answered))
        enough.set()
        await asyncio.gather(*clients)


async def test_another_launcher_does_not_take_the_same_ports(launcher: Launcher) -> None:
    for flag, door in (("--port", "grpc"), ("--http-port", "http")):
        port = launcher.addresses[door].rpartition(":")[2]
        arguments = ["--port", "0", "--http-port", "none", "--gateways", "2", flag, port]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "baton.services.launcher", "up", "--model", "models/demo"),
            *arguments,
            cwd=ROOT,
            env=process_environment(),
            stderr=asyncio.subprocess.PIPE,
        )
        _, stderr = await process.communicate()
        assert process.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port} ({flag}): " in stderr.decode()
        assert stderr.count(b"\n") == 1


async def _over_grpc(channel: grpc.aio.Channel) -> str:
    call = inference_service_pb2_grpc.InferenceServiceStub(channel).Generate(_REQUEST, timeout=60)
    return "".join([response.chunk.text + response.finished.text async for response in call])


async def _over_http(launcher: Launcher) -> str:
    reply = await ask(launcher.addresses["http"], "/v1/completions", _BODY)
    assert reply.status == 200, reply.body
    text: str = json.loads(reply.body)["choices"][0]["text"]
    return text


def _command(pid: int) -> bytes:
    """Empty for what is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
