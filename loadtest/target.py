"""Which endpoint is driven, and what it says of its model before the first request."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import grpc

from baton.loadtest.http_stream import HttpBroken, HttpClient
from baton.loadtest.spec import LoadError
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc as pb_grpc

CHANNEL_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
_PROBE_S = 5.0
_PORTS = {"grpc": 50051, "http": 80, "https": 443}


@dataclass(frozen=True)
class Target:
    scheme: str
    """grpc, http or https."""
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Target:
        """Reads grpc://HOST:PORT, http://HOST:PORT or https://HOST:PORT; without a scheme it is
        gRPC. Raises LoadError."""
        form = "must be grpc://HOST:PORT, http://HOST:PORT or https://HOST:PORT"
        try:
            parts = urlsplit(text if "://" in text else f"grpc://{text}")
            scheme, host, port = parts.scheme, parts.hostname, parts.port
        except ValueError:
            raise LoadError(f"--target {text}: {form}") from None
        if scheme not in _PORTS or not host or parts.path.rstrip("/") not in ("", "/v1"):
            raise LoadError(f"--target {text}: {form}")
        return cls(scheme, host, port or _PORTS[scheme])

    @property
    def is_grpc(self) -> bool:
        return self.scheme == "grpc"

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.address}"


@dataclass(frozen=True)
class ModelFacts:
    """None: the endpoint does not say."""

    name: str
    max_model_len: int | None = None
    vocab_size: int | None = None


async def probe(target: Target, model: str = "") -> ModelFacts:
    """Asks which model is served. Raises LoadError when nobody answers, or it is not `model`."""
    try:
        async with asyncio.timeout(_PROBE_S):
            served = await (_probe_grpc(target) if target.is_grpc else _probe_http(target))
    except TimeoutError:
        raise LoadError(f"--target {target}: no answer within {_PROBE_S:g} s") from None
    except OSError as error:
        reason = error.strerror or "cannot connect"
        raise LoadError(f"--target {target}: nobody answers: {reason}") from None
    except HttpBroken as error:
        raise LoadError(f"--target {target}: {error}") from None
    for facts in served:
        if model in ("", facts.name):
            return facts
    names = ", ".join(facts.name for facts in served) or "no model"
    raise LoadError(f"--model {model}: {target} serves {names}")


async def _probe_grpc(target: Target) -> list[ModelFacts]:
    async with grpc.aio.insecure_channel(target.address, options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        try:
            info = await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=_PROBE_S)
        except grpc.aio.AioRpcError as error:
            detail = " ".join((error.details() or "").split())[:200]
            if "Connection refused" in detail:
                raise LoadError(f"--target {target}: nobody answers: Connection refused") from None
            raise LoadError(
                f"--target {target}: nobody answers there as Baton does:"
                f" {error.code().name}: {detail}"
            ) from None
    return [ModelFacts(info.model_name, info.max_model_len, info.vocab_size)]


async def _probe_http(target: Target) -> list[ModelFacts]:
    client = HttpClient(target.host, target.port, tls=target.scheme == "https")
    body = bytearray()
    try:
        status = await client.exchange(client.encode("/v1/models", None), body.extend)
    finally:
        client.close()
    if status != 200:
        raise LoadError(f"--target {target}: /v1/models answers {status}")
    try:
        models: list[dict[str, Any]] = json.loads(bytes(body))["data"]
        return [ModelFacts(model["id"], model.get("max_model_len")) for model in models]
    except (ValueError, KeyError, TypeError):
        raise LoadError(f"--target {target}: /v1/models is not of OpenAI's form") from None
