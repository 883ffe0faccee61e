"""What the gateway's doors share: admission, deadlines, counters and the drain, whoever asks.

gRPC (server.py) and HTTP (openai/) are thin over one Frontend, so that the same request gets the
same answer through both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from itertools import count, takewhile
from typing import Any

from baton.services.gateway.admission import (
    ChatPrompt,
    CheckConstraint,
    ModelDefaults,
    chat_prompt,
    check_text,
    check_token_ids,
)
from baton.services.gateway.chat_format import NO_FORMAT, ChatFormat
from baton.services.gateway.cluster import Cluster
from baton.services.gateway.generate import generate
from baton.services.gateway.identity import Identify, Identity, ask_nobody, with_bearer
from baton.services.gateway.metrics import GatewayMetrics
from baton.services.gateway.tokenizer import TextCodec
from baton.shared.directory.directory import DirectoryUnavailable
from baton.shared.directory.workers import accepted_at
from baton.shared.model_files.info import ModelInfo
from baton.shared.rpc.convert import ROLE_TO_PB
from baton.shared.rpc.errors import DeadlineExceeded, Draining, NoTokenizer
from baton.shared.telemetry import NO_TRACE, Counters, Trace, baton_version
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2


class Frontend:
    def __init__(
        self,
        cluster: Cluster,
        codec: TextCodec | None,
        *,
        model: ModelInfo,
        model_name: str,
        incarnation: str,
        default_sampling: types_pb2.SamplingParams | None = None,
        identify: Identify = ask_nobody,
        check_constraint: CheckConstraint | None = None,
        chat_format: ChatFormat = NO_FORMAT,
        trace: Trace = NO_TRACE,
    ) -> None:
        """`default_sampling`: its fields are for requests that do not set them. `identify`:
        asked by every door before anything else of a request is looked at. `chat_format`: how the
        model writes calls of tools and reasoning."""
        self.identify = identify
        self._trace = trace
        self._check_constraint = check_constraint
        self.cluster = cluster
        self.codec = codec
        self.chat_format = chat_format
        self.model = model
        self.model_name = model_name
        self.incarnation = incarnation
        self.counters = Counters()
        self.metrics = GatewayMetrics(model_name)
        self.metrics.watch(
            cluster,
            self.counters,
            lambda: self.num_in_flight,
            incarnation=incarnation,
            version=baton_version(),
        )
        self.num_in_flight = 0
        self.is_leaving = False
        """Shutting down: health says so, before anything is refused."""
        self.is_draining = False
        """From then on `generate` refuses; what runs goes on."""
        self.defaults = ModelDefaults(
            _eos_token_ids(model, codec), default_sampling or types_pb2.SamplingParams()
        )
        self._request_numbers = count(1)
        self._running: set[asyncio.Timeout] = set()
        self._is_cut_off = False

    async def who_asks(self, headers: Mapping[str, str]) -> Identity:
        """What every door asks with: it makes no difference in which of the headers a token is.
        Raises a BatonError for those who may not ask."""
        return await self.identify(with_bearer(headers))

    async def generate(
        self,
        request: pb.GenerateRequest,
        *,
        identity: Identity,
        time_left_s: float | None,
        shown_token_ids: Collection[int] = (),
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The answer, message by message. Closing it, or cancelling who reads it, frees everything.
        `shown_token_ids`: special tokens that its text is to have, for whoever takes it apart.

        Raises a BatonError. Draining and NoTokenizer come before the first message; so does
        InvalidField, unless the last worker that could hold the sequence goes away after it.
        """
        if self.is_draining:
            self.metrics.requests.labels("UNAVAILABLE").inc()
            raise Draining("the gateway is shutting down")
        deadline = None if time_left_s is None else time.monotonic() + time_left_s
        responses = generate(
            request,
            identity=identity,
            request_id=f"{self.incarnation[:12]}-{next(self._request_numbers)}",
            deadline=deadline,
            cluster=self.cluster,
            codec=self.codec,
            check_constraint=self._check_constraint,
            defaults=self.defaults,
            counters=self.counters,
            metrics=self.metrics,
            shown_token_ids=shown_token_ids,
            is_cut_off=lambda: self._is_cut_off,
            trace=self._trace,
        )
        self.num_in_flight += 1
        limit = asyncio.timeout(time_left_s)
        try:
            async with limit, aclosing(responses):
                self._running.add(limit)
                async for response in responses:
                    yield response
        except TimeoutError:
            if self._is_cut_off:
                raise Draining("the gateway shut down before the answer was whole") from None
            raise DeadlineExceeded("the request's deadline has passed") from None
        except (asyncio.CancelledError, GeneratorExit):
            self.counters["cancelled"] += 1
            raise
        finally:
            self._running.discard(limit)
            self.num_in_flight -= 1

    def cut_off(self) -> None:
        """The end of a drain: what still runs ends with Draining, and nothing else begins."""
        self.is_draining = self._is_cut_off = True
        for limit in self._running:
            if not limit.expired():
                limit.reschedule(0.0)

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises InvalidField, NoTokenizer."""
        check_text("text", text, self.cluster.limits())
        return await self.text_codec().encode_async(text, add_special_tokens=add_special_tokens)

    async def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> ChatPrompt:
        """The prompt of a chat, by the model's own template. `options`: those of
        TextCodec.render_chat.

        Raises InvalidField, NoTokenizer, NoChatTemplate.
        """
        return await chat_prompt(
            messages,
            self.cluster.limits(),
            self.text_codec(),
            add_special_tokens=add_special_tokens,
            **options,
        )

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Raises InvalidField, NoTokenizer."""
        check_token_ids("token_ids", token_ids, self.cluster.limits())
        return await self.text_codec().decode_async(token_ids, skip_special=skip_special_tokens)

    def text_codec(self) -> TextCodec:
        """Raises NoTokenizer."""
        if self.codec is None:
            raise NoTokenizer("the model has no tokenizer")
        return self.codec

    def model_info(self) -> pb.GetModelInfoResponse:
        limits, records = self.cluster.limits(), self.cluster.records()
        info = pb.GetModelInfoResponse(
            model_name=self.model_name,
            model_type=self.model.model_type,
            vocab_size=self.model.vocab_size,
            max_model_len=limits.max_model_len,
            eos_token_ids=sorted(self.defaults.eos_token_ids),
            has_tokenizer=self.codec is not None,
            block_size=records[0].capability.block_size if records else 0,
        )
        template = self.codec.chat_template if self.codec else None
        if template is not None:
            info.chat_template = template
        return info

    async def server_info(self) -> pb.GetServerInfoResponse:
        info = pb.GetServerInfoResponse(
            version=baton_version(),
            gateway_incarnation=self.incarnation,
            directory_reachable=self.cluster.is_directory_reachable,
            workers=self._worker_statuses(),
            counters=self._server_counters(),
            default_sampling=self.defaults.sampling,
            model_digest=self.cluster.served.digest or "",
            directory_problem=str(self.cluster.directory_problem or ""),
        )
        try:
            for stage, num_entries in (await self.cluster.ledger_counts()).items():
                info.ledger.add(stage=stage.name, num_entries=num_entries)
            info.num_prefix_entries = await self.cluster.num_prefix_entries()
        except DirectoryUnavailable as error:
            info.directory_reachable = False
            info.directory_problem = str(error)
        return info

    def _worker_statuses(self) -> list[pb.WorkerStatus]:
        suspects = {s.incarnation for s in self.cluster.snapshots() if s.suspect}
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
                num_free_blocks=sum(record.load.num_free_blocks),
                num_blocks=sum(record.capacity.num_blocks),
                capability_hash=record.capability.hash(),
                determinism=record.capability.determinism,
                max_model_len=record.capacity.longest,
                model_impl=record.model.model_impl,
                num_checkpoints=record.load.counters.get("num_checkpoints", 0),
                drafter=record.model.drafter,
            )
            for record in self.cluster.records()
        ]

    def _server_counters(self) -> pb.ServerCounters:
        workers = self.cluster.worker_counters()
        return pb.ServerCounters(
            num_requests=self.counters["requests"],
            num_extra_attempts=self.counters["extra_attempts"],
            num_cancelled=self.counters["cancelled"],
            num_preemptions=workers["num_preemptions"],
            num_digest_mismatches=workers["num_digest_mismatches"],
            num_computed_prompt_tokens=workers["num_computed_prompt_tokens"],
            num_cached_prompt_tokens=workers["num_cached_prompt_tokens"],
            num_pulled_blocks=workers["num_pulled_blocks"],
            num_drafts=workers["num_drafts"],
            num_drafted_tokens=workers["num_drafted_tokens"],
            num_accepted_tokens=workers["num_accepted_tokens"],
            num_accepted_by_position=_by_position(workers),
            num_captured_prompt_steps=workers["num_captured_prompt_steps"],
            num_launched_prompt_steps=workers["num_launched_prompt_steps"],
            num_kept_states=workers["num_kept_states"],
            num_restored_states=workers["num_restored_states"],
        )


def _by_position(counters: Mapping[str, int]) -> list[int]:
    """Up to the last place that the workers count at all."""
    counted = takewhile(lambda name: name in counters, map(accepted_at, count()))
    return [counters[name] for name in counted]


def _eos_token_ids(model: ModelInfo, codec: TextCodec | None) -> frozenset[int]:
    """Those of the model's own files, and the one that its tokenizer's files name: a fine-tuned
    model may tell of its end there only."""
    eos_token_ids = set(model.eos_token_ids)
    of_tokenizer = codec.eos_token_id if codec else None
    if of_tokenizer is not None and of_tokenizer < model.vocab_size:
        eos_token_ids.add(of_tokenizer)
    return frozenset(eos_token_ids)
