"""A real server on loopback whose handlers raise: what its clients see."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.shared.rpc.errors import (
    BatonError,
    DigestMismatch,
    Draining,
    InvalidField,
    failure_of,
    from_failure,
)
from baton.shared.rpc.serve import (
    Endpoint,
    bare_host,
    channel_options,
    internal_channel,
    join_address,
)
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc
from tests.ipv6 import needs_ipv6

if TYPE_CHECKING:
    Stub = inference_service_pb2_grpc.InferenceServiceAsyncStub

SERVICE = "baton.v1.InferenceService"
LIMIT_BYTES = 64 << 10
SECRET = "/home/somebody/model.safetensors"


class Servicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Raises `error`, after `num_responses` responses where they are a stream."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.num_responses = 0
        self.answer = pb.TokenizeResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        if self.error is not None:
            raise self.error
        return self.answer

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        for _ in range(self.num_responses):
            yield pb.GenerateResponse()
        if self.error is not None:
            raise self.error

    async def Detokenize(self, request: Any, context: Any) -> pb.DetokenizeResponse:
        raise NotImplementedError

    async def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:
        raise NotImplementedError

    async def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:
        raise NotImplementedError


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def endpoint(servicer: Servicer) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(max_message_bytes=LIMIT_BYTES)
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, endpoint.server)
    await endpoint.start("127.0.0.1", 0, [SERVICE])
    yield endpoint
    await endpoint.stop(0)


@pytest.fixture
async def channel(endpoint: Endpoint) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(
        endpoint.address, options=channel_options(1 << 20)
    ) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Stub:
    return inference_service_pb2_grpc.InferenceServiceStub(channel)


async def failure_of_unary(stub: Stub) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(pb.TokenizeRequest(text="x"), timeout=10)
    return caught.value


async def failure_of_stream(stub: Stub, num_before: int) -> grpc.aio.AioRpcError:
    num_received = 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(pb.GenerateRequest(), timeout=10):
            num_received += 1
    assert num_received == num_before
    return caught.value


ERRORS = [
    InvalidField("text", "is empty", limit="1 … 4096 characters"),
    Draining("shutting down"),
    DigestMismatch("2 blocks differ"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_our_errors_become_their_code_with_a_typed_detail(
    stub: Stub, servicer: Servicer, error: BatonError
) -> None:
    servicer.error = error
    servicer.num_responses = 3
    for caught in (await failure_of_unary(stub), await failure_of_stream(stub, 3)):
        assert caught.code() is error.code
        assert caught.details() == error.message
        failure = failure_of(caught)
        assert failure is not None
        assert type(from_failure(failure)) is type(error)
        if isinstance(error, InvalidField):
            assert (failure.field, failure.limit) == (error.field, error.limit)


async def test_faults_of_ours_are_internal_and_stay_in_the_log(
    stub: Stub, servicer: Servicer, caplog: pytest.LogCaptureFixture
) -> None:
    servicer.error = FileNotFoundError(SECRET)
    servicer.num_responses = 1
    for caught in (await failure_of_unary(stub), await failure_of_stream(stub, 1)):
        assert caught.code() is grpc.StatusCode.INTERNAL
        assert caught.details() == "internal error"
        assert SECRET not in str(caught) and failure_of(caught) is None
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 2 and SECRET in caplog.text


async def test_the_server_goes_on_after_a_fault(stub: Stub, servicer: Servicer) -> None:
    servicer.error = ZeroDivisionError()
    await failure_of_unary(stub)
    servicer.error = None
    servicer.answer = pb.TokenizeResponse(token_ids=[1, 2])
    answer = await stub.Tokenize(pb.TokenizeRequest(text="x"), timeout=10)
    assert answer.token_ids == [1, 2]


async def test_a_request_over_the_limit_is_refused(stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(pb.TokenizeRequest(text="x" * LIMIT_BYTES), timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        too_long = pb.GenerateRequest(text="x" * LIMIT_BYTES)
        _ = [message async for message in stub.Generate(too_long, timeout=10)]
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_request_just_under_the_limit_is_served(stub: Stub) -> None:
    await stub.Tokenize(pb.TokenizeRequest(text="x" * (LIMIT_BYTES - 100)), timeout=10)


async def test_an_answer_over_the_limit_is_refused_too(stub: Stub, servicer: Servicer) -> None:
    servicer.answer = pb.TokenizeResponse(token_ids=[2**31] * LIMIT_BYTES)
    caught = await failure_of_unary(stub)
    assert caught.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_health_says_when_the_service_is_ready(
    channel: grpc.aio.Channel, endpoint: Endpoint
) -> None:
    stub = cast(Any, health_pb2_grpc.HealthStub(channel))

    async def health(service: str) -> int:
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        return cast(int, answer.status)

    serving = health_pb2.HealthCheckResponse.SERVING
    assert await health("") == serving
    assert await health(SERVICE) != serving
    await endpoint.set_ready(is_ready=True)
    assert await health(SERVICE) == serving
    await endpoint.set_ready(is_ready=False)
    assert await health(SERVICE) != serving and await health("") == serving


@pytest.mark.parametrize(
    ("host", "bare", "address"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:80"),
        ("node.example", "node.example", "node.example:80"),
        ("::1", "::1", "[::1]:80"),
        ("[::1]", "::1", "[::1]:80"),
        ("fe80::1%eth0", "fe80::1%eth0", "[fe80::1%eth0]:80"),
    ],
)
def test_hosts_with_and_without_brackets(host: str, bare: str, address: str) -> None:
    assert bare_host(host) == bare
    assert join_address(host, 80) == address


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_ipv6(servicer: Servicer, host: str) -> None:
    endpoint = Endpoint(max_message_bytes=LIMIT_BYTES)
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, endpoint.server)
    await endpoint.start(host, 0, [SERVICE])
    try:
        assert endpoint.address.startswith("[::1]:")
        async with grpc.aio.insecure_channel(endpoint.address) as channel:
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
            await stub.Tokenize(pb.TokenizeRequest(text="x"), timeout=10)
    finally:
        await endpoint.stop(0)


async def test_a_port_that_is_taken_is_an_error_of_one_line(endpoint: Endpoint) -> None:
    port = int(endpoint.address.rpartition(":")[2])
    second = Endpoint(max_message_bytes=LIMIT_BYTES)
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        await second.start("127.0.0.1", port, [])


async def test_our_own_channels_know_no_proxy(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`channel_options` alone goes through it: whoever listens there sees every request."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    options = [*channel_options(1 << 20), ("grpc.use_local_subchannel_pool", 1)]
    through_proxy = grpc.aio.insecure_channel(endpoint.address, options=options)
    async with internal_channel(endpoint.address) as own, through_proxy as other:
        stubs: list[Any] = [health_pb2_grpc.HealthStub(channel) for channel in (own, other)]
        await stubs[0].Check(health_pb2.HealthCheckRequest(), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError):
            await stubs[1].Check(health_pb2.HealthCheckRequest(), timeout=10)


def test_calls_that_the_end_cuts_off_are_not_told_as_failures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """gRPC logged and printed a traceback for each, most times."""

    async def until_ended(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b""
        await asyncio.Event().wait()

    handler: Any = grpc.unary_stream_rpc_method_handler(until_ended)

    async def serve_and_stop() -> None:
        endpoint = Endpoint(max_message_bytes=LIMIT_BYTES)
        endpoint.server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("Test", {"Endless": handler})]
        )
        await endpoint.start("127.0.0.1", 0, [])
        async with internal_channel(endpoint.address) as channel:
            # Any: the stub's methods take no bytes.
            endless: Any = channel.unary_stream("/Test/Endless")
            call = endless(b"")
            await call.read()
            await endpoint.stop(0.0)

    for _ in range(5):
        asyncio.run(serve_and_stop())
    assert "not handled" not in caplog.text
