"""READY comes after an answer through every door, not after promises."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from baton.services.launcher import first_answer
from baton.services.launcher.first_answer import until_answered
from baton.shared.rpc.serve import PUBLIC_MESSAGE_BYTES, Endpoint
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc

SERVICE = "baton.v1.InferenceService"


class Gateway(inference_service_pb2_grpc.InferenceServiceServicer):
    """Fails as often as it is told to; remembers what was asked."""

    def __init__(self) -> None:
        self.num_failures = 0
        self.asked: list[pb.GenerateRequest] = []

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[Any]:
        self.asked.append(request)
        if len(self.asked) <= self.num_failures:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no worker\ncan be reached")
        yield pb.GenerateResponse(finished=pb.GenerateFinished())

    async def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(model_name="m", vocab_size=8, max_model_len=64)

    async def Tokenize(self, request: Any, context: Any) -> pb.TokenizeResponse:
        raise NotImplementedError

    async def Detokenize(self, request: Any, context: Any) -> pb.DetokenizeResponse:
        raise NotImplementedError

    async def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:
        raise NotImplementedError


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
async def endpoint(gateway: Gateway) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(max_message_bytes=PUBLIC_MESSAGE_BYTES)
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(gateway, endpoint.server)
    await endpoint.start("127.0.0.1", 0, [SERVICE])
    yield endpoint
    await endpoint.stop(0)


async def test_a_route_that_fails_is_told_once_and_tried_again(
    endpoint: Endpoint, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.services.launcher.first_answer._PAUSE_S", 0.0)
    monkeypatch.setattr("baton.services.launcher.first_answer._POLL_S", 0.0)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    gateway.num_failures = 2
    told: list[str] = []
    looks: list[bool] = []

    async def look(*asked: Any) -> bool:
        looks.append(await is_serving(*asked))
        return looks[-1]

    is_serving = first_answer._is_serving
    monkeypatch.setattr(first_answer, "_is_serving", look)
    async with asyncio.timeout(60):
        waiting = asyncio.create_task(until_answered(endpoint.address, None, told.append))
        while looks.count(False) < 5:
            await asyncio.sleep(0.01)
    assert not gateway.asked, "nothing is asked of a gateway that does not serve"
    await endpoint.set_ready(is_ready=True)
    async with asyncio.timeout(60):
        await waiting
    assert len(gateway.asked) == 3
    # Both workers of a pair have their part in two tokens.
    assert gateway.asked[0].sampling.max_tokens == 2 and gateway.asked[0].sampling.ignore_eos
    [line] = told
    assert line.endswith("UNAVAILABLE: no worker can be reached")


async def test_http_is_asked_too(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.services.launcher.first_answer._PAUSE_S", 0.0)
    bodies: list[dict[str, Any]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        bodies.append(json.loads(await reader.readexactly(length)))
        status = "200 OK" if len(bodies) > 1 else "503 Service Unavailable"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        writer.close()

    await endpoint.set_ready(is_ready=True)
    told: list[str] = []
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with asyncio.timeout(60):
            await until_answered(endpoint.address, f"127.0.0.1:{port}", told.append)
    assert [body["max_tokens"] for body in bodies] == [2, 2] and bodies[0]["model"] == "m"
    assert len(told) == 1 and "HTTP 503" in told[0]
