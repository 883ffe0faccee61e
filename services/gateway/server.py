"""InferenceService: between messages and the gateway's parts, no more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from typing import TYPE_CHECKING, Any

import grpc
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc, types_pb2

from services.gateway.admission import check_text, check_token_ids
from services.gateway.cluster import Cluster
from services.gateway.generate import generate
from services.gateway.tokenizer import TextCodec
from shared.directory.directory import DirectoryUnavailable
from shared.engine.config import ModelConfig
from shared.rpc.convert import ROLE_TO_PB
from shared.rpc.errors import DeadlineExceeded, Draining, NoTokenizer
from shared.telemetry import Counters

if TYPE_CHECKING:
    _Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    def __init__(
        self,
        cluster: Cluster,
        codec: TextCodec | None,
        *,
        model: ModelConfig,
        model_name: str,
        incarnation: str,
    ) -> None:
        self._cluster = cluster
        self._codec = codec
        self._model = model
        self._model_name = model_name
        self._incarnation = incarnation
        self._request_numbers = count(1)
        self._counters = Counters()
        self.is_draining = False
        self.num_in_flight = 0

    async def Generate(
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        if self.is_draining:
            raise Draining("the gateway is shutting down")
        time_left_s = context.time_remaining()
        deadline = None if time_left_s is None else time.monotonic() + time_left_s
        responses = generate(
            request,
            request_id=f"{self._incarnation[:12]}-{next(self._request_numbers)}",
            deadline=deadline,
            cluster=self._cluster,
            codec=self._codec,
            eos_token_ids=frozenset(self._model.eos_token_ids),
            counters=self._counters,
        )
        self.num_in_flight += 1
        try:
            async with asyncio.timeout(time_left_s), aclosing(responses):
                async for response in responses:
                    yield response
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline has passed") from None
        except (asyncio.CancelledError, GeneratorExit):
            self._counters["cancelled"] += 1
            raise
        finally:
            self.num_in_flight -= 1

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        check_text("text", request.text, self._cluster.limits())
        token_ids = await self._text_codec().encode_async(
            request.text, add_special_tokens=request.add_special_tokens
        )
        return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: _Context
    ) -> pb.DetokenizeResponse:
        check_token_ids("token_ids", request.token_ids, self._cluster.limits())
        text = self._text_codec().decode(
            list(request.token_ids), skip_special=request.skip_special_tokens
        )
        return pb.DetokenizeResponse(text=text)

    def _text_codec(self) -> TextCodec:
        if self._codec is None:
            raise NoTokenizer("the model has no tokenizer")
        return self._codec

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: _Context
    ) -> pb.GetModelInfoResponse:
        limits, records = self._cluster.limits(), self._cluster.records()
        info = pb.GetModelInfoResponse(
            model_name=self._model_name,
            model_type=self._model.model_type,
            vocab_size=self._model.vocab_size,
            max_model_len=limits.max_model_len,
            eos_token_ids=self._model.eos_token_ids,
            has_tokenizer=self._codec is not None,
            block_size=records[0].capability.block_size if records else 0,
        )
        template = self._codec.chat_template if self._codec else None
        if template is not None:
            info.chat_template = template
        return info

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: _Context
    ) -> pb.GetServerInfoResponse:
        info = pb.GetServerInfoResponse(
            version=_version(),
            gateway_incarnation=self._incarnation,
            directory_reachable=self._cluster.is_directory_reachable,
            workers=self._worker_statuses(),
            counters=self._server_counters(),
        )
        try:
            for stage, num_entries in (await self._cluster.ledger_counts()).items():
                info.ledger.add(stage=stage.name, num_entries=num_entries)
            info.num_prefix_entries = await self._cluster.num_prefix_entries()
        except DirectoryUnavailable:
            info.directory_reachable = False
        return info

    def _worker_statuses(self) -> list[pb.WorkerStatus]:
        suspects = {s.incarnation for s in self._cluster.snapshots() if s.suspect}
        return [
            pb.WorkerStatus(
                worker=types_pb2.WorkerAddress(
                    worker_id=record.worker_id,
                    incarnation=record.incarnation,
                    address=record.address,
                ),
                role=ROLE_TO_PB[record.role],
                healthy=record.incarnation not in suspects,
                num_waiting=record.load.num_waiting,
                num_running=record.load.num_running,
                num_free_blocks=record.load.num_free_blocks,
                num_blocks=record.num_blocks,
                capability_hash=record.capability.hash(),
                determinism=record.capability.determinism,
            )
            for record in self._cluster.records()
        ]

    def _server_counters(self) -> pb.ServerCounters:
        workers = self._cluster.worker_counters()
        return pb.ServerCounters(
            num_requests=self._counters["requests"],
            num_extra_attempts=self._counters["extra_attempts"],
            num_cancelled=self._counters["cancelled"],
            num_preemptions=workers["num_preemptions"],
            num_digest_mismatches=workers["num_digest_mismatches"],
            num_computed_prompt_tokens=workers["num_computed_prompt_tokens"],
            num_cached_prompt_tokens=workers["num_cached_prompt_tokens"],
            num_pulled_blocks=workers["num_pulled_blocks"],
        )


def _version() -> str:
    try:
        return version("baton-llm")
    except PackageNotFoundError:
        return "unknown"
