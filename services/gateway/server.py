"""InferenceService: between messages and the Frontend, no more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc

from baton.services.gateway.frontend import Frontend
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc

if TYPE_CHECKING:
    _Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Generate(
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        identity = await self._frontend.who_asks(_headers(context))
        responses = self._frontend.generate(
            request, identity=identity, time_left_s=context.time_remaining()
        )
        async with aclosing(responses):
            async for response in responses:
                yield response

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        token_ids = await self._frontend.tokenize(
            request.text, add_special_tokens=request.add_special_tokens
        )
        return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: _Context
    ) -> pb.DetokenizeResponse:
        text = await self._frontend.detokenize(
            list(request.token_ids), skip_special_tokens=request.skip_special_tokens
        )
        return pb.DetokenizeResponse(text=text)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: _Context
    ) -> pb.GetModelInfoResponse:
        return self._frontend.model_info()

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: _Context
    ) -> pb.GetServerInfoResponse:
        return await self._frontend.server_info()


def _headers(context: _Context) -> dict[str, str]:
    """The call's metadata that is text."""
    metadata = context.invocation_metadata() or ()
    return {name: value for name, value in metadata if isinstance(value, str)}
