"""How answers end that a drain does not wait for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import cast

import grpc
import pytest

from baton.services.gateway import generate
from baton.services.gateway.admission import Limits
from baton.services.gateway.cluster import Cluster
from baton.services.gateway.drain import drain
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.generation import Generation
from baton.services.gateway.openai.endpoint import HttpEndpoint
from baton.services.gateway.served_model import ServedModel
from baton.services.gateway.server import InferenceServicer
from baton.shared.model_files.info import load_model_info
from baton.shared.rpc.errors import failure_of
from baton.shared.rpc.serve import Endpoint
from baton.v1 import error_details_pb2, inference_service_pb2_grpc
from baton.v1 import inference_service_pb2 as pb
from tests.device import ROOT
from tests.unit.gateway.null_frontend import ask, events, new_endpoint, wait_until

BODY = {"prompt": [1, 2, 3], "max_tokens": 400}


class NoWorkers:
    served = ServedModel("null", 1000)

    def limits(self) -> Limits:
        return Limits(vocab_size=1000, max_model_len=512, max_pool_tokens=None)

    def has_route(self) -> bool:
        return True


@pytest.fixture
def begun() -> list[str]:
    """The requests whose one token has gone out."""
    return []


@pytest.fixture
def frontend(monkeypatch: pytest.MonkeyPatch, begun: list[str]) -> Frontend:
    async def one_token_and_no_more(
        generation: Generation, *rest: object
    ) -> AsyncGenerator[list[int], None]:
        generation.token_ids.append(7)
        yield [7]
        begun.append(generation.request_id)
        await asyncio.Event().wait()

    monkeypatch.setattr(generate, "attempts", one_token_and_no_more)
    model = load_model_info(ROOT / "models" / "demo")
    cluster = cast(Cluster, NoWorkers())
    return Frontend(cluster, None, model=model, model_name="demo", incarnation="5" * 32)


@pytest.fixture
async def doors(frontend: Frontend) -> AsyncIterator[tuple[Endpoint, HttpEndpoint]]:
    endpoint, http = Endpoint(max_message_bytes=1 << 20), new_endpoint(frontend)
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceServicer(frontend), endpoint.server
    )
    await endpoint.start("127.0.0.1", 0, ["baton.v1.InferenceService"])
    await http.start("127.0.0.1", 0)
    yield endpoint, http
    await endpoint.stop(0)


async def test_what_is_cut_off_says_so_through_both_doors(
    frontend: Frontend, doors: tuple[Endpoint, HttpEndpoint], begun: list[str]
) -> None:
    endpoint, http = doors
    streamed = asyncio.create_task(ask(http.address, "/v1/completions", BODY | {"stream": True}))
    whole = asyncio.create_task(ask(http.address, "/v1/completions", BODY))
    async with grpc.aio.insecure_channel(endpoint.address) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(token_ids=[1, 2, 3])))
        await wait_until(lambda: len(begun) == 3)

        await drain(frontend, endpoint, http, shared_for_s=None, limit_s=0.1)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    failure = failure_of(caught.value)
    assert failure is not None and failure.reason == error_details_pb2.FAILURE_REASON_DRAINING

    # The stream is whole as HTTP: no client takes it for a broken connection, or for an answer.
    first, last = events((await streamed).body)
    assert "choices" in first
    error = {"type": "server_error", "param": None, "code": "draining"}
    assert last == {"error": {"message": failure.message, **error}}
    reply = await whole
    assert (reply.status, json.loads(reply.body)) == (503, last)
    assert frontend.metrics.registry.get_sample_value(
        "baton_requests_total", {"status": "UNAVAILABLE"}
    ) == pytest.approx(3)
    assert frontend.num_in_flight == 0


async def test_a_deadline_stays_a_deadline(
    frontend: Frontend, doors: tuple[Endpoint, HttpEndpoint]
) -> None:
    endpoint, http = doors
    body = BODY | {"stream": True}
    late = asyncio.create_task(
        ask(http.address, "/v1/completions", body, headers="x-request-timeout: 0.2\r\n")
    )
    await wait_until(lambda: frontend.num_in_flight == 1 or late.done())
    await drain(frontend, endpoint, http, shared_for_s=None, limit_s=30)
    assert events((await late).body)[-1]["error"]["code"] == "deadline"
