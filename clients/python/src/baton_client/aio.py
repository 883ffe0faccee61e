"""The asynchronous client: the same surface as client.py, to be awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack, cast
from weakref import WeakSet

import grpc

from baton_client import health
from baton_client.answer import Answer, Chunk, Progress, text_of
from baton_client.connection import Connection, Option, Tls, Token
from baton_client.errors import BatonError, Cancelled, cancelled, cut_off, from_rpc_error
from baton_client.request import generate_request
from baton_client.retry import RetryPolicy, Tries
from baton_client.sampling import Sampling
from baton_client.v1 import inference_service_pb2 as pb
from baton_client.v1 import inference_service_pb2_grpc, types_pb2

_T = TypeVar("_T")
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Call = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
_Start = Callable[[pb.GenerateRequest, float | None], _Call]


class AsyncClient:
    """Talks to one target, from one event loop. Close it, or use it with `async with`.

    May be made outside the loop: it connects with the first call.
    """

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
        """As `Client`."""
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
        self._closed = asyncio.Event()
        self._streams: WeakSet[AsyncAnswerStream] = WeakSet()
        self._channel: grpc.aio.Channel | None = None

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
    ) -> AsyncAnswerStream:
        """As `Client.generate`; not awaited itself, but to be called where the event loop runs."""
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
        stream = AsyncAnswerStream(self._start_generate, Progress(request), tries)
        self._streams.add(stream)
        return stream

    async def tokenize(
        self, text: str, *, add_special_tokens: bool = True, deadline_s: float | None = 30.0
    ) -> list[int]:
        """As `Client.tokenize`."""
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list((await self._ask(self._stub.Tokenize, request, deadline_s)).token_ids)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        deadline_s: float | None = 30.0,
    ) -> str:
        """As `Client.detokenize`."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._ask(self._stub.Detokenize, request, deadline_s)).text

    async def model_info(self, *, deadline_s: float | None = 30.0) -> pb.GetModelInfoResponse:
        return await self._ask(self._stub.GetModelInfo, pb.GetModelInfoRequest(), deadline_s)

    async def server_info(self, *, deadline_s: float | None = 30.0) -> pb.GetServerInfoResponse:
        return await self._ask(self._stub.GetServerInfo, pb.GetServerInfoRequest(), deadline_s)

    async def wait_ready(self, *, deadline_s: float | None = 60.0) -> None:
        """As `Client.wait_ready`."""
        wait = health.Wait(deadline_s)
        check = self._open_channel().unary_unary(health.METHOD, health.to_bytes, health.from_bytes)
        while not wait.is_over:
            metadata = self._connection.metadata()
            try:
                call = check(health.REQUEST, timeout=wait.timeout_s(), metadata=metadata)
                wait.answered(await _unless_cancelled(call))
            except grpc.aio.AioRpcError as error:
                wait.failed(from_rpc_error(error))
            except Cancelled as error:
                wait.failed(error)
            if not wait.is_over and await _is_set_within(self._closed, wait.pause_s()):
                raise cancelled("the client was closed")

    async def close(self) -> None:
        """Ends the calls that run: they raise Cancelled."""
        self._closed.set()
        for stream in list(self._streams):
            stream.cancel()
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def _stub(self) -> inference_service_pb2_grpc.InferenceServiceAsyncStub:
        # It is one class at run time, and two for the type checker.
        stub = inference_service_pb2_grpc.InferenceServiceStub(self._open_channel())
        return cast("inference_service_pb2_grpc.InferenceServiceAsyncStub", stub)

    def _open_channel(self) -> grpc.aio.Channel:
        if self._closed.is_set():
            raise cancelled("the client was closed")
        if self._channel is None:
            target, options = self._connection.target, self._connection.options
            credentials = self._connection.credentials()
            if credentials is None:
                self._channel = grpc.aio.insecure_channel(target, options)
            else:
                self._channel = grpc.aio.secure_channel(target, credentials, options)
        return self._channel

    def _start_generate(self, request: pb.GenerateRequest, timeout_s: float | None) -> _Call:
        metadata = self._connection.metadata()
        return self._stub.Generate(request, timeout=timeout_s, metadata=metadata)

    async def _ask(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        deadline_s: float | None,
    ) -> _Response:
        tries = Tries(self._retry, deadline_s)
        while True:
            metadata = self._connection.metadata()
            try:
                call = method(request, timeout=tries.time_left_s(), metadata=metadata)
                return await _unless_cancelled(call)
            except grpc.aio.AioRpcError as error:
                wait_s = tries.wait_s_after(from_rpc_error(error))
            except Cancelled as error:
                wait_s = 0.0 if self._closed.is_set() else tries.wait_s_after(error)
            if await _is_set_within(self._closed, wait_s):
                raise cancelled("the client was closed")


class AsyncAnswerStream(AsyncIterator[Chunk]):
    """One answer as it comes. Leaving its `async with` block, or dropping it, cancels what is left.

    One task reads; when that task is cancelled, so is the answer. The error that ended an answer is
    raised again by each further read; the tokens that had come stay in `token_ids`.
    """

    def __init__(self, start: _Start, progress: Progress, tries: Tries) -> None:
        """`AsyncClient.generate` makes it."""
        self._start = start
        self._progress = progress
        self._tries = tries
        self._cancelled = asyncio.Event()
        self._error: BatonError | None = None
        self._call = self._begin()

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

    async def __anext__(self) -> Chunk:
        if self._error is not None:
            raise self._error
        try:
            while (message := await self._next_message()) is not None:
                chunk = self._progress.take(message)
                if chunk is not None:
                    if chunk.token_ids:
                        self._tries.progressed()
                    return chunk
        except BatonError as error:
            self._error = error
            self.cancel()
            raise
        except asyncio.CancelledError:
            self.cancel()
            raise
        raise StopAsyncIteration

    async def result(self) -> Answer:
        """The whole answer, once it is there; with `n` above 1, the first of them."""
        return (await self.results())[0]

    async def results(self) -> tuple[Answer, ...]:
        """All `n` answers, in order, once they are there."""
        async for _ in self:
            pass
        return tuple(self._progress.answers())

    async def text(self) -> str:
        """The text of `result`. Raises Unsupported when the model has no tokenizer."""
        return text_of(await self.result())

    def cancel(self) -> None:
        """Ends it: its reader gets Cancelled. Has no effect on an answer that has ended."""
        self._cancelled.set()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    async def _next_message(self) -> pb.GenerateResponse | None:
        """The next chunk, whichever request brings it; None after the last."""
        while True:
            error: BatonError = cut_off()
            try:
                message = await _unless_cancelled(self._call.read())
                if message is not grpc.aio.EOF:
                    return cast(pb.GenerateResponse, message)
            except grpc.aio.AioRpcError as rpc_error:
                error = from_rpc_error(rpc_error)
            except Cancelled as cancelled_elsewhere:
                error = cancelled_elsewhere
            if self._progress.is_finished:
                return None
            if self._cancelled.is_set():
                raise cancelled("by this client")
            wait_s = self._tries.wait_s_after(error)
            if await _is_set_within(self._cancelled, wait_s):
                raise cancelled("by this client")
            self._call = self._begin()

    def _begin(self) -> _Call:
        return self._start(self._progress.next_request(), self._tries.time_left_s())


async def _unless_cancelled(answer: Awaitable[_T]) -> _T:
    """Raises Cancelled for a call that somebody else ended.

    grpc.aio shows that in the same way as the cancelling of the task that waits for the call.
    """
    try:
        return await answer
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise cancelled("the server ended the call") from None


async def _is_set_within(event: asyncio.Event, wait_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await event.wait()
    return event.is_set()
