"""The HTTP endpoint over a Frontend without workers: answers are scripted, the rest is real."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, cast

from baton.services.gateway.admission import Limits, ModelDefaults
from baton.services.gateway.chat_format import ChatFormat
from baton.services.gateway.cluster import Cluster
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.identity import Identity, ask_nobody
from baton.services.gateway.metrics import GatewayMetrics
from baton.services.gateway.openai.app import build_app
from baton.services.gateway.openai.endpoint import HttpEndpoint
from baton.services.gateway.served_model import ServedModel
from baton.services.gateway.tokenizer import TextCodec
from baton.shared.model_files.info import ModelInfo
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2

Script = Callable[[pb.GenerateRequest], AsyncGenerator[pb.GenerateResponse, None]]


class NullFrontend(Frontend):
    """`requests` are those that reached it; `script` answers them."""

    def __init__(self, codec: TextCodec | None = None) -> None:
        self.cluster = cast(Cluster, _NullCluster())
        self.codec = codec
        self.chat_format = ChatFormat()
        self.identify = ask_nobody
        self.defaults = ModelDefaults()
        self.model = cast(ModelInfo, None)
        self.model_name = "null"
        self.metrics = GatewayMetrics(self.model_name)
        self.num_in_flight = 0
        self.is_leaving = self.is_draining = False
        self.requests: list[pb.GenerateRequest] = []
        self.script: Script = echo
        self.num_closed = 0

    async def generate(
        self,
        request: pb.GenerateRequest,
        *,
        identity: Identity,
        time_left_s: float | None,
        shown_token_ids: Collection[int] = (),
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        self.requests.append(request)
        self.num_in_flight += 1
        try:
            async for response in self.script(request):
                yield response
        finally:
            self.num_in_flight -= 1
            self.num_closed += 1


class _NullCluster:
    def __init__(self) -> None:
        self.has_workers = True
        self.served = ServedModel("null", 1000)

    def limits(self) -> Limits:
        return Limits(vocab_size=1000, max_model_len=512, max_pool_tokens=None)

    def has_route(self) -> bool:
        return self.has_workers


def started(num_prompt_tokens: int = 3) -> pb.GenerateResponse:
    message = pb.GenerateStarted(request_id="r-1", seed=1, num_prompt_tokens=num_prompt_tokens)
    return pb.GenerateResponse(started=message)


def chunk(text: str, index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        chunk=pb.GenerateChunk(first_index=index, token_ids=[index + 10], text=text)
    )


def finished(text: str = "", num_tokens: int = 2) -> pb.GenerateResponse:
    usage = pb.Usage(num_prompt_tokens=3, num_completion_tokens=num_tokens, num_cached_tokens=2)
    return pb.GenerateResponse(
        finished=pb.GenerateFinished(
            finish_reason=types_pb2.FINISH_REASON_STOP, text=text, usage=usage
        )
    )


async def echo(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Two tokens."""
    yield started()
    yield chunk("Hel", 0)
    yield chunk("lo", 1)
    yield finished()


async def endless(request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
    yield started()
    index = 0
    while True:
        yield chunk("x" * 1000, index)
        index += 1
        await asyncio.sleep(0)


def new_endpoint(frontend: Frontend) -> HttpEndpoint:
    return HttpEndpoint(build_app(frontend), on_refused=frontend.metrics.http_refused)


@asynccontextmanager
async def serving(frontend: Frontend) -> AsyncIterator[HttpEndpoint]:
    endpoint = new_endpoint(frontend)
    await endpoint.start("127.0.0.1", 0)
    try:
        yield endpoint
    finally:
        await endpoint.stop()


def num_refused(frontend: Frontend) -> dict[str, float]:
    """HTTP requests refused so far, by status."""
    return {
        sample.labels["status"]: sample.value
        for family in frontend.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "baton_http_refused_total"
    }


class Reply:
    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {
            name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])
        }

    @property
    def error(self) -> dict[str, Any]:
        """In OpenAI's shape, or the test fails."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return cast(dict[str, Any], error)


async def ask(
    address: str, path: str, body: object = None, *, method: str = "", headers: str = ""
) -> Reply:
    """One request on a connection of its own; `body` bytes are sent as they are."""
    content = b"" if body is None else body
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    method = method or ("GET" if body is None else "POST")
    head = f"{method} {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\n{headers}"
    head += f"content-length: {len(content)}\r\n\r\n"
    return Reply(await send(address, head.encode() + content))


async def send(address: str, data: bytes) -> bytes:
    """Everything that comes back until the server closes."""
    reader, writer = await connect(address)
    try:
        writer.write(data)
        return await reader.read()
    finally:
        writer.close()


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


def events(body: bytes) -> list[Any]:
    """Of a stream: parsed, `[DONE]` as text. Takes a chunked body apart first."""
    lines = _unchunked(body).decode().split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


def typed_events(stream: bytes, *, is_chunked: bool = True) -> list[dict[str, Any]]:
    """Of a stream whose events have names, each the type of its data as well."""
    texts = (_unchunked(stream) if is_chunked else stream).decode().split("\n\n")
    assert texts.pop() == ""
    parsed = []
    for text in texts:
        name, data = text.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
    return parsed


def _unchunked(body: bytes) -> bytes:
    content = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        content += rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]
    return content


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)
