"""Whether a request would succeed: one is made, through each door, the way that clients go.

That a gateway knows workers does not show that it reaches them, nor that they reach each other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.services.launcher.target import connect
from baton.shared.rpc.serve import bare_host
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc as pb_grpc
from baton.v1 import types_pb2

# "" is the process, the other is what requests are sent to.
_SERVICES = ("", "baton.v1.InferenceService")
_POLL_S = 0.05
_NUM_TOKENS = 2
"""The first comes from the prefill worker, the second from the decode worker."""
_FIRST_LIMIT_S = 10.0
_LONGEST_LIMIT_S = 60.0
_PAUSE_S = 0.5


class _NoAnswer(Exception):
    """One line."""


async def until_answered(
    address: str, http_address: str | None, notice: Callable[[str], None]
) -> None:
    """Returns when a request has been answered through gRPC, and through HTTP if that is there.

    The gateway may be restarted meanwhile. What keeps requests from passing is told to `notice`,
    once as long as it stays the same.
    """
    limit_s, told = _FIRST_LIMIT_S, ""
    async with connect(address) as channel:
        while True:
            await _until_serving(channel)
            try:
                model = await _ask_grpc(channel, limit_s)
                if http_address is not None:
                    await asyncio.to_thread(_ask_http, http_address, model, limit_s)
                return
            except _NoAnswer as problem:
                if str(problem) != told:
                    told = str(problem)
                    notice(f"not ready yet, a request of two tokens fails: {told}")
            limit_s = min(2 * limit_s, _LONGEST_LIMIT_S)
            await asyncio.sleep(_PAUSE_S)


async def _until_serving(channel: grpc.aio.Channel) -> None:
    """Returns when the gateway says that it has a route."""
    # Any: the types of this stub name no methods.
    stub: Any = health_pb2_grpc.HealthStub(channel)
    while not all([await _is_serving(stub, service) for service in _SERVICES]):
        await asyncio.sleep(_POLL_S)


async def _is_serving(stub: Any, service: str) -> bool:
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=1.0)
    except grpc.aio.AioRpcError:
        # Not there just now, or the service is not known yet.
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _ask_grpc(channel: grpc.aio.Channel, limit_s: float) -> pb.GetModelInfoResponse:
    """The model that answered. Raises _NoAnswer."""
    stub = pb_grpc.InferenceServiceStub(channel)
    try:
        model = await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=limit_s)
        sampling = types_pb2.SamplingParams(
            temperature=0.0, max_tokens=_num_tokens(model), ignore_eos=True
        )
        request = pb.GenerateRequest(token_ids=pb.TokenIds(token_ids=[0]), sampling=sampling)
        async for _ in stub.Generate(request, timeout=limit_s):
            pass
    except grpc.aio.AioRpcError as error:
        details = " ".join((error.details() or "").split())
        raise _NoAnswer(f"{error.code().name}: {details}") from None
    return model


def _ask_http(address: str, model: pb.GetModelInfoResponse, limit_s: float) -> None:
    """Raises _NoAnswer."""
    host, _, port = address.rpartition(":")
    body = {
        "model": model.model_name,
        "prompt": [0],
        "max_tokens": _num_tokens(model),
        "temperature": 0,
        "ignore_eos": True,
    }
    # Of the standard library's clients the one that looks for no proxy.
    connection = HTTPConnection(bare_host(host), int(port), timeout=limit_s)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        text = response.read(1000).decode(errors="replace")
    except (OSError, HTTPException) as error:
        raise _NoAnswer(f"HTTP: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise _NoAnswer(f"HTTP {response.status}: {' '.join(text.split())}")


def _num_tokens(model: pb.GetModelInfoResponse) -> int:
    return max(1, min(_NUM_TOKENS, model.max_model_len - 1))
