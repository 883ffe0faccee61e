"""The examples do what they say."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest
import uvicorn
from baton_client import AsyncClient, RetryPolicy
from fastapi import FastAPI
from starlette.testclient import TestClient

from baton.shared.rpc.errors import InvalidField
from examples import summary_service
from tests.client.scripted import WHOLE_TEXT, ScriptedGateway, Try, aborts, fails, hangs
from tests.device import ROOT


def run_stream(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "clients" / "python" / "src"), *sys.path])
    return subprocess.run(
        [sys.executable, "examples/stream.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_stream() -> None:
    with ScriptedGateway(Try(5, aborts(grpc.StatusCode.UNAVAILABLE)), Try()) as gateway:
        done = run_stream("x", "--target", gateway.address, "--max-tokens", "12")
        assert gateway.requests[0].sampling.max_tokens == 12
    assert done.stdout == f"{WHOLE_TEXT}\n[12 tokens, ended by length]\n"
    refused = Try(0, fails(InvalidField("text", "is empty", limit="1")), started=False)
    with ScriptedGateway(refused) as gateway:
        done = run_stream("", "--target", gateway.address)
    assert done.returncode == 1
    assert done.stderr == "\nINVALID_ARGUMENT: text is empty; limit: 1\n"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RetryPolicy(max_tries=2, first_backoff_s=0.001)
    monkeypatch.setattr(
        "examples.summary_service.AsyncClient",
        lambda target, **more: AsyncClient(target, retry=policy, **more),
    )


@contextlib.contextmanager
def service(gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("BATON_TARGET", gateway.address)
    with TestClient(summary_service.app) as client:
        yield client


def test_long_text_is_summed_up_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "abcdefghij" * 20  # 200 tokens of the scripted gateway, whose model takes 128
    with ScriptedGateway() as gateway, service(gateway, monkeypatch) as client:
        response = client.post("/summaries", content=text)
        prompts = [request.text for request in gateway.requests if hasattr(request, "sampling")]
    assert response.status_code == 200
    assert response.text == "\n\n".join([WHOLE_TEXT] * len(prompts))
    assert all(prompt.endswith(summary_service.QUESTION) for prompt in prompts)
    assert "".join(p.removesuffix(summary_service.QUESTION) for p in prompts) == text
    assert len(prompts) > 2 and all(len(prompt) + 48 <= 128 for prompt in prompts)


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (Try(0, fails(InvalidField("text", "is wrong", limit="right"))), 400),
        (Try(0, aborts(grpc.StatusCode.UNAVAILABLE)), 503),
        (Try(0, aborts(grpc.StatusCode.DEADLINE_EXCEEDED)), 504),
        (Try(0, aborts(grpc.StatusCode.INTERNAL)), 502),
    ],
)
def test_statuses(
    script: Try, status: int, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedGateway(script) as gateway, service(gateway, monkeypatch) as client:
        assert client.post("/summaries", content="x").status_code == status


def test_error_after_the_first_part(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Try(6, aborts(grpc.StatusCode.INTERNAL, "oh"))
    with ScriptedGateway(broken) as gateway, service(gateway, monkeypatch) as client:
        response = client.post("/summaries", content="x")
    assert response.status_code == 200
    assert response.text == " 100 101 102 103 104\n[INTERNAL: oh]\n"


def test_bad_bodies_and_health(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedGateway() as gateway, service(gateway, monkeypatch) as client:
        assert client.post("/summaries", content=" \n").status_code == 400
        too_long = b"x" * (summary_service.MAX_TEXT_BYTES + 1)
        assert client.post("/summaries", content=too_long).status_code == 413
        assert not gateway.requests
        gateway.set_ready(False)
        assert client.get("/health").status_code == 504
        gateway.set_ready(True)
        assert client.get("/health").status_code == 200


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[int]:
    """Its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


async def test_reader_that_goes_away_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedGateway(Try(4, hangs)) as gateway:
        monkeypatch.setenv("BATON_TARGET", gateway.address)
        async with listening(summary_service.app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /summaries HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx")
            assert b"200 OK" in await reader.readline()
            await asyncio.to_thread(gateway.hanging.wait, 60)
            writer.close()
            assert await asyncio.to_thread(gateway.let_go.wait, 60)
