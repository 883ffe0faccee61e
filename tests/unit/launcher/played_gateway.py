"""A gateway that says what the test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc

from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc as pb_grpc

Responses = Iterator[pb.GenerateResponse]
Behaviour = Callable[[pb.GenerateRequest, grpc.ServicerContext], Responses]


class Gateway(pb_grpc.InferenceServiceServicer):
    def __init__(self) -> None:
        self.behaviour: Behaviour = say_nothing
        self.info = pb.GetServerInfoResponse()
        self.model = pb.GetModelInfoResponse()
        self.target = ""

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
        return self.behaviour(request, context)

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        return self.info

    def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetModelInfoResponse:
        return self.model

    def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.ServicerContext
    ) -> pb.TokenizeResponse:
        raise NotImplementedError

    def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.ServicerContext
    ) -> pb.DetokenizeResponse:
        raise NotImplementedError


def say_nothing(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
    yield pb.GenerateResponse(finished=pb.GenerateFinished())


def chunk(first_index: int, token_ids: list[int], text: str | None) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        chunk=pb.GenerateChunk(first_index=first_index, token_ids=token_ids, text=text)
    )


def started() -> pb.GenerateResponse:
    return pb.GenerateResponse(started=pb.GenerateStarted(request_id="r", seed=1))
