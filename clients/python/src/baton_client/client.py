"""The synchronous client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack
from weakref import WeakSet

import grpc

from baton_client import health
from baton_client.answer import Answer, Chunk, Progress, text_of
from baton_client.connection import Connection, Option, Tls, Token
from baton_client.errors import BatonError, cancelled, cut_off, from_rpc_error
from baton_client.request import generate_request
from baton_client.retry import RetryPolicy, Tries
from baton_client.sampling import Sampling
from baton_client.v1 import inference_service_pb2 as pb
from baton_client.v1 import inference_service_pb2_grpc, types_pb2

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class _Call(Protocol):
    """The part of gRPC's own class that is used here."""

    def __iter__(self) -> Iterator[pb.GenerateResponse]: ...

    def cancel(self) -> bool: ...


_Start = Callable[[pb.GenerateRequest, float | None], _Call]


class Client:
    """Talks to one target; safe to use from several threads. Close it, or use it with `with`."""

    def __init__(
        self,
        target: str,
        *,
        tls: Tls | bool = False,
        token: Token | None = None,
        allow_insecure_token: bool = False,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008  (it is frozen)
        keepalive_s: float | None = 20.0,
        max_message_bytes: int = 64 << 20,
        options: Sequence[Option] = (),
    ) -> None:
        """The arguments are those of `baton_client.connection.Connection`, and when to try again.

        Connects with the first call. Raises ValueError for arguments that cannot work.
        """
        self._connection = Connection(
            target,
            tls=tls,
            token=token,
            allow_insecure_token=allow_insecure_token,
            keepalive_s=keepalive_s,
            max_message_bytes=max_message_bytes,
            options=options,
        )
        self._retry = retry
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._streams: WeakSet[AnswerStream] = WeakSet()
        credentials, channel_options = self._connection.credentials(), self._connection.options
        if credentials is None:
            self._channel = grpc.insecure_channel(target, channel_options)
        else:
            self._channel = grpc.secure_channel(target, credentials, channel_options)
        self._stub = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        self._check_health = self._channel.unary_unary(
            health.METHOD, health.to_bytes, health.from_bytes
        )

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        n: int | None = None,
        received_token_ids: Sequence[int] = (),
        received_samples: Sequence[Sequence[int]] = (),
        standalone_text: bool = False,
        constraint: types_pb2.Constraint | None = None,
        deadline_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AnswerStream:
        """Asks for the answer to a text, to tokens or to a chat, and returns at once: iterate over
        it, or call its `text()` or `result()`.

        `messages` are a chat's, each with `role` (system, user or assistant) and `content`; the
        model's own template makes a prompt of them. The answer's text is the next message. `n`
        answers come side by side, each chunk with its `sample`. `received_token_ids` are tokens of
        this very answer that the caller has already (`received_samples`: of each of `n`); a sampled
        answer needs its `seed` as well. `standalone_text`: the answer's text is a turn of its own,
        not the rest of the prompt's, with which some models' first word begins with a space.
        `constraint` says which texts the answer may be (`baton_client.v1.types_pb2.Constraint`).
        `deadline_s` is for the whole answer, retries included.

        Raises TypeError and InvalidRequest for arguments that fit into no request; all that the
        server objects to comes with the first chunk.
        """
        request = generate_request(
            prompt,
            token_ids,
            messages,
            received_token_ids,
            sampling,
            n=n,
            received_samples=received_samples,
        )
        request.standalone_text = standalone_text
        if constraint is not None:
            request.constraint.CopyFrom(constraint)
        tries = Tries(self._retry, deadline_s)
        stream = AnswerStream(self._start_generate, Progress(request), tries)
        with self._lock:
            self._streams.add(stream)
        return stream

    def tokenize(
        self, text: str, *, add_special_tokens: bool = True, deadline_s: float | None = 30.0
    ) -> list[int]:
        """`add_special_tokens`: as a prompt gets them. Raises Unsupported without a tokenizer."""
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list(self._ask(self._stub.Tokenize, request, deadline_s).token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        deadline_s: float | None = 30.0,
    ) -> str:
        """Raises Unsupported when the model has no tokenizer."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._ask(self._stub.Detokenize, request, deadline_s).text

    def model_info(self, *, deadline_s: float | None = 30.0) -> pb.GetModelInfoResponse:
        return self._ask(self._stub.GetModelInfo, pb.GetModelInfoRequest(), deadline_s)

    def server_info(self, *, deadline_s: float | None = 30.0) -> pb.GetServerInfoResponse:
        return self._ask(self._stub.GetServerInfo, pb.GetServerInfoRequest(), deadline_s)

    def wait_ready(self, *, deadline_s: float | None = 60.0) -> None:
        """Returns when a request would find workers. Raises DeadlineExceeded, or what no waiting
        mends."""
        wait = health.Wait(deadline_s)
        while not wait.is_over:
            try:
                wait.answered(
                    self._check_health(
                        health.REQUEST, timeout=wait.timeout_s(), metadata=self._metadata()
                    )
                )
            except grpc.RpcError as error:
                wait.failed(from_rpc_error(error))
            if not wait.is_over and self._closed.wait(wait.pause_s()):
                raise cancelled("the client was closed")

    def close(self) -> None:
        """Ends the calls that run: they raise Cancelled."""
        self._closed.set()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        if self._closed.is_set():
            raise cancelled("the client was closed")
        return self._connection.metadata()

    def _start_generate(self, request: pb.GenerateRequest, timeout_s: float | None) -> _Call:
        return self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata())

    def _ask(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        deadline_s: float | None,
    ) -> _Response:
        tries = Tries(self._retry, deadline_s)
        while True:
            try:
                return method(request, timeout=tries.time_left_s(), metadata=self._metadata())
            except grpc.RpcError as error:
                wait_s = tries.wait_s_after(from_rpc_error(error))
            if self._closed.wait(wait_s):
                raise cancelled("the client was closed")


class AnswerStream(Iterator[Chunk]):
    """One answer as it comes. Leaving its `with` block, or dropping it, cancels what is left.

    One thread reads; any may call `cancel`. The error that ended an answer is raised again by each
    further read; the tokens that had come stay in `token_ids`.
    """

    def __init__(self, start: _Start, progress: Progress, tries: Tries) -> None:
        """`Client.generate` makes it."""
        self._start = start
        self._progress = progress
        self._tries = tries
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._error: BatonError | None = None
        self._call: _Call
        self._begin()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All that came, `received_token_ids` included; with `n` above 1, of the first sample."""
        return self._progress.token_ids[0]

    @property
    def token_ids_by_sample(self) -> tuple[tuple[int, ...], ...]:
        """Of each sample all that came: what `received_samples` takes."""
        return tuple(self._progress.token_ids)

    @property
    def started(self) -> pb.GenerateStarted | None:
        """Request id, seed and number of prompt tokens; None before the first message."""
        return self._progress.started

    @property
    def num_resumes(self) -> int:
        """How often it broke after tokens had come, and went on."""
        return self._progress.num_resumes

    def __next__(self) -> Chunk:
        if self._error is not None:
            raise self._error
        try:
            while (message := self._next_message()) is not None:
                chunk = self._progress.take(message)
                if chunk is not None:
                    if chunk.token_ids:
                        self._tries.progressed()
                    return chunk
        except BatonError as error:
            self._error = error
            self.cancel()
            raise
        raise StopIteration

    def result(self) -> Answer:
        """The whole answer, once it is there; with `n` above 1, the first of them."""
        return self.results()[0]

    def results(self) -> tuple[Answer, ...]:
        """All `n` answers, in order, once they are there."""
        for _ in self:
            pass
        return tuple(self._progress.answers())

    def text(self) -> str:
        """The text of `result`. Raises Unsupported when the model has no tokenizer."""
        return text_of(self.result())

    def cancel(self) -> None:
        """Ends it: its reader gets Cancelled. Has no effect on an answer that has ended."""
        with self._lock:
            self._cancelled.set()
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def _next_message(self) -> pb.GenerateResponse | None:
        """The next chunk, whichever request brings it; None after the last."""
        while True:
            try:
                message = next(iter(self._call), None)
            except grpc.RpcError as rpc_error:
                message, error = None, from_rpc_error(rpc_error)
            else:
                error = cut_off()
            if message is not None or self._progress.is_finished:
                return message
            if self._cancelled.is_set():
                raise cancelled("by this client")
            wait_s = self._tries.wait_s_after(error)
            if self._cancelled.wait(wait_s):
                raise cancelled("by this client")
            self._begin()

    def _begin(self) -> None:
        request, timeout_s = self._progress.next_request(), self._tries.time_left_s()
        with self._lock:
            if self._cancelled.is_set():
                raise cancelled("by this client")
            self._call = self._start(request, timeout_s)
