"""A gateway that plays a script: where each try breaks, and how."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton.shared.rpc.errors import BatonError, trailers
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc, types_pb2

Context = grpc.ServicerContext
Ending = Callable[["ScriptedGateway", Context], None]

SERVICE = "baton.v1.InferenceService"
TOKEN_IDS = tuple(range(100, 112))
SEED = 1 << 63
"""Needs all 64 bits."""
NUM_PROMPT_TOKENS = 5
_HELD_BACK = "~"


def texts(token_ids: tuple[int, ...]) -> str:
    """What is certain after these tokens: the last one's text is held back."""
    return "".join(f" {token_id}" for token_id in token_ids[:-1])


WHOLE_TEXT = texts(TOKEN_IDS) + _HELD_BACK


@dataclass(frozen=True)
class Try:
    """What one request for the answer gets."""

    upto: int = len(TOKEN_IDS)
    """Index of the token before which it ends."""
    ending: Ending | None = None
    """None: well, when all tokens are sent; otherwise as if there were no more."""
    started: bool = True
    seed: int | None = None
    num_prompt_tokens: int = NUM_PROMPT_TOKENS
    model_digest: str = ""
    shift: int = 0
    """Added to the first index of each chunk."""


def aborts(code: grpc.StatusCode, message: str = "so it says") -> Ending:
    """Without details, as a connection or a proxy that breaks."""

    def abort(gateway: ScriptedGateway, context: Context) -> NoReturn:
        context.abort(code, message)

    return abort


def fails(error: BatonError) -> Ending:
    """As the gateway's own errors."""

    def fail(gateway: ScriptedGateway, context: Context) -> NoReturn:
        context.set_trailing_metadata(trailers(error))
        context.abort(error.code, error.message)

    return fail


def hangs(gateway: ScriptedGateway, context: Context) -> None:
    """Until the client ends the call."""
    ended = threading.Event()
    if not context.add_callback(ended.set):
        ended.set()
    gateway.hanging.set()
    ended.wait(60)


def ends_early(gateway: ScriptedGateway, context: Context) -> None:
    """With OK, and without the last message."""


class ScriptedGateway(inference_service_pb2_grpc.InferenceServiceServicer):
    """Listens on loopback while its `with` block runs; the last try is played again and again."""

    def __init__(
        self, *tries: Try, credentials: grpc.ServerCredentials | None = None, port: int = 0
    ) -> None:
        self._tries = list(tries) or [Try()]
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.unary_endings: list[Ending] = []
        """Played before the questions that are answered at once."""
        self.hanging, self.let_go = threading.Event(), threading.Event()
        """A call waits for its client to end it; a call has ended."""
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if credentials is None:
            port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        else:
            port = self._server.add_secure_port(f"127.0.0.1:{port}", credentials)
        self.address = f"127.0.0.1:{port}"

    def __enter__(self) -> ScriptedGateway:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def set_ready(self, is_ready: bool) -> None:
        status = health_pb2.HealthCheckResponse
        self._health.set(SERVICE, status.SERVING if is_ready else status.NOT_SERVING)

    def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> Iterator[pb.GenerateResponse]:
        script = self._tries[min(len(self.requests), len(self._tries) - 1)]
        self._note(request, context)
        if not context.add_callback(self.let_go.set):
            self.let_go.set()
        if script.started:
            started = pb.GenerateStarted(
                request_id=f"request-{len(self.requests)}",
                seed=script.seed or request.sampling.seed or SEED,
                num_prompt_tokens=script.num_prompt_tokens,
                model_digest=script.model_digest,
            )
            yield pb.GenerateResponse(started=started)
        index = len(request.received_token_ids)
        assert tuple(request.received_token_ids) == TOKEN_IDS[:index]
        while index < script.upto:
            # Chunks of one, two, three, one, ... tokens.
            end = min(script.upto, index + 1 + index % 3)
            chunk = pb.GenerateChunk(
                first_index=index + script.shift,
                token_ids=TOKEN_IDS[index:end],
                text=texts(TOKEN_IDS[:end]).removeprefix(texts(TOKEN_IDS[:index])),
            )
            yield pb.GenerateResponse(chunk=chunk)
            index = end
        if script.ending is not None:
            script.ending(self, context)
            return
        yield pb.GenerateResponse(finished=_finished())

    def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        self._answer_at_once(request, context)
        token_ids = [1] * request.add_special_tokens + list(request.text.encode())
        return pb.TokenizeResponse(token_ids=token_ids)

    def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        self._answer_at_once(request, context)
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode())

    def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        self._answer_at_once(request, context)
        return pb.GetModelInfoResponse(model_name="scripted", max_model_len=128)

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        self._answer_at_once(request, context)
        return pb.GetServerInfoResponse(version="1")

    def _answer_at_once(self, request: Any, context: Context) -> None:
        self._note(request, context)
        if self.unary_endings:
            self.unary_endings.pop(0)(self, context)

    def _note(self, request: Any, context: Context) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))


def _finished() -> pb.GenerateFinished:
    finished = pb.GenerateFinished(
        finish_reason=types_pb2.FINISH_REASON_LENGTH,
        text=_HELD_BACK,
        usage=pb.Usage(
            num_prompt_tokens=NUM_PROMPT_TOKENS,
            num_completion_tokens=len(TOKEN_IDS),
            num_cached_tokens=4,
        ),
        prefill_worker_id="p0",
        decode_worker_id="d0",
        num_attempts=2,
    )
    finished.timing.ttft_time.FromMilliseconds(1500)
    finished.timing.e2e_time.FromMilliseconds(2250)
    return finished
