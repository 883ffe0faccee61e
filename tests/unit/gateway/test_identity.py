"""Who asks: known at both doors, and told to all who cache for him."""

from __future__ import annotations

import json
from collections.abc import Mapping

import grpc
import pytest

from baton.services.gateway.identity import Identity
from baton.shared.rpc.errors import Draining
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from tests.unit.gateway.whole_gateway import TOKEN, WholeGateway, whole_gateway

PROMPT = [*range(300)]
DOORS = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize")


async def by_header(headers: Mapping[str, str]) -> Identity:
    tenant = headers.get("x-tenant", "")
    if tenant == "mallory":
        # Any error of ours: there is none for strangers yet.
        raise Draining("go away")
    return Identity(tenant)


async def ask_both(gateway: WholeGateway, **headers: str) -> None:
    """The same prompt through gRPC, then through HTTP."""
    sampling = types_pb2.SamplingParams(max_tokens=1)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(token_ids=PROMPT), sampling=sampling)
    _, chunk, finished = await gateway.ask_grpc(request, **headers)
    assert list(chunk.chunk.token_ids) == [TOKEN] and finished.HasField("finished")
    reply = await gateway.ask_http({"prompt": PROMPT, "max_tokens": 1}, **headers)
    assert reply.status == 200, reply.body


async def test_nobody_is_asked_who_he_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async with whole_gateway(monkeypatch) as gateway:
        await ask_both(gateway, **{"x-tenant": "a"})
        assert [sequence.salt for _, sequence in gateway.started] == [b"", b""]


async def test_the_tenant_reaches_the_sequence_through_both_doors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with whole_gateway(monkeypatch, identify=by_header) as gateway:
        await ask_both(gateway, **{"x-tenant": "a"})
        await ask_both(gateway)
        assert [sequence.salt for _, sequence in gateway.started] == [b"a", b"a", b"", b""]


async def test_each_tenant_is_sent_where_his_own_prefix_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker_ids = ("both-0", "both-1", "both-2")
    async with whole_gateway(monkeypatch, worker_ids=worker_ids, identify=by_header) as gateway:
        body = {"prompt": PROMPT, "max_tokens": 1}

        async def worker_for(**headers: str) -> str:
            await gateway.ask_http(body, **headers)
            return gateway.started[-1][0]

        tenants: list[dict[str, str]] = [{"x-tenant": "a"}, {"x-tenant": "b"}, {}]
        # Nobody holds anything for them: equal workers are taken in turn.
        homes = [await worker_for(**tenant) for tenant in tenants]
        assert sorted(homes) == list(worker_ids)
        assert len(gateway.directory.holders) == 3, "equal prompts, yet each lists its own hash"
        # By turns it would be others.
        again = [await worker_for(**tenant) for tenant in reversed(tenants)]
        assert again == list(reversed(homes))


async def test_who_may_not_ask_is_refused_at_both_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    async with whole_gateway(monkeypatch, identify=by_header) as gateway:
        mallory = {"x-tenant": "mallory"}
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await gateway.ask_grpc(pb.GenerateRequest(), **mallory)
        assert refused.value.details() == "go away"
        reply = await gateway.ask_http({"prompt": {"not": "looked at"}}, **mallory)
        assert (reply.status, json.loads(reply.body)["error"]["message"]) == (503, "go away")
        assert gateway.started == []


async def test_a_key_in_its_own_header_is_the_bearer_token_at_every_door(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str | None] = []

    async def look(headers: Mapping[str, str]) -> Identity:
        seen.append(headers.get("authorization"))
        return Identity(headers.get("x-tenant", ""))

    async with whole_gateway(monkeypatch, identify=look) as gateway:
        for headers, token in (
            ({"x-api-key": "k"}, "Bearer k"),
            ({"authorization": "Bearer t"}, "Bearer t"),
            ({"authorization": "Bearer t", "x-api-key": "k"}, "Bearer k"),
            ({}, None),
        ):
            await ask_both(gateway, **headers)
            for path in DOORS:
                await gateway.ask_http({}, path=path, **headers)
            assert seen == [token] * (2 + len(DOORS)), headers
            seen.clear()
