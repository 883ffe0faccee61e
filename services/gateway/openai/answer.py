"""An answer over HTTP: one or several runs of Frontend.generate, streamed or whole.

requests ─► merged ─► take (parser ─► parts ─► wire) ─► chunks, or one body
              │
    a client that goes away ends all of it
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.services.gateway.answer_parts import PLAIN, Content, Part, Reading, ToolCall
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.identity import Identity
from baton.services.gateway.merged import merged
from baton.services.gateway.openai.errors import HttpError, renamed, to_http_error
from baton.services.gateway.openai.logprobs import Logprobs, PromptLogprobs
from baton.services.gateway.openai.wire import FINISH_REASONS, Choice, Wire
from baton.shared.rpc.errors import BatonError
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2

_IS_ASKED = "baton.is_asked"


@dataclass(frozen=True)
class Ask:
    """What an endpoint made of its request."""

    requests: Sequence[pb.GenerateRequest]
    identity: Identity
    fields: dict[str, str]
    """What this endpoint calls the fields of GenerateRequest, for errors."""
    new_wire: Callable[[str], Wire]
    """Of a request's id."""
    is_streamed: bool
    time_left_s: float | None = None
    reading: Reading = PLAIN
    new_logprobs: Callable[[], Logprobs] | None = None
    """Of a choice; None: nobody asks for them."""
    new_prompt_logprobs: Callable[[], PromptLogprobs] | None = None
    """The same of its prompt's, where they are told beside the answer."""
    echoes: Sequence[str] = ()
    """The text of each prompt, where the answer begins with it."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Where the endpoint's request has what chat completions call so: see `renamed`."""
    id_headers: Sequence[bytes] = (b"x-request-id",)

    def to_error(self, error: Exception) -> HttpError:
        """In the endpoint's own names."""
        return renamed(to_http_error(error, self.fields), self.places)


class Answer(Response):
    """Runs when it is sent, so that all of it ends with the client's connection."""

    def __init__(self, frontend: Frontend, ask: Ask) -> None:
        super().__init__()
        self._frontend = frontend
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises HttpError as long as nothing has been sent."""
        ask = self._ask
        scope[_IS_ASKED] = True
        self._frontend.metrics.http_asked(scope["path"])
        sources = [
            self._frontend.generate(
                request,
                identity=ask.identity,
                time_left_s=ask.time_left_s,
                shown_token_ids=ask.reading.shown_token_ids,
            )
            for request in ask.requests
        ]
        run = _Run(ask)
        is_gone = False
        try:
            async with asyncio.timeout(None) as until_gone, aclosing(merged(sources)) as responses:

                async def watch() -> None:
                    nonlocal is_gone
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    is_gone = True
                    until_gone.reschedule(0)

                watcher = asyncio.create_task(watch())
                try:
                    if ask.is_streamed:
                        await _stream(run, responses, send)
                    else:
                        await _send_whole(run, responses, send)
                finally:
                    watcher.cancel()
        except TimeoutError:
            # A client that is gone gets no answer, and that it went is not our error.
            if not is_gone:
                raise
        except BatonError as error:
            raise ask.to_error(error) from error


def is_asked(scope: Scope) -> bool:
    """Whether Frontend.generate has, or had, this HTTP request's requests."""
    return _IS_ASKED in scope


@dataclass
class _Run:
    ask: Ask
    by_index: dict[int, Choice] = field(default_factory=dict)
    """All samples of a prompt, then those of the next one."""
    wire: Wire | None = None
    request_id: str = ""

    @property
    def choices(self) -> list[Choice]:
        return [self.by_index[index] for index in sorted(self.by_index)]

    def take(self, prompt: int, response: pb.GenerateResponse) -> bytes:
        """Keeps what the message says; returns the events to send for it."""
        first_index = prompt * self._num_samples(prompt)
        match response.WhichOneof("message"):
            case "started":
                return self._take_started(prompt, first_index, response.started)
            case "prompt_logprobs":
                return self._take_prompt(prompt, first_index, response.prompt_logprobs)
            case "chunk":
                index = first_index + response.chunk.sample
                return self._take_chunk(index, self.by_index[index], response.chunk)
            case _:
                index = first_index + response.finished.sample
                return self._take_finished(index, self.by_index[index], response.finished)

    def _num_samples(self, prompt: int) -> int:
        """Of each prompt as many."""
        request = self.ask.requests[prompt]
        return request.n if request.HasField("n") else 1

    def _take_started(self, prompt: int, first_index: int, started: pb.GenerateStarted) -> bytes:
        """Choices are made now and not before: what is refused has none."""
        if self.wire is None:
            self.request_id = started.request_id
            self.wire = self.ask.new_wire(self.request_id)
        told = self.ask.new_prompt_logprobs() if self.ask.new_prompt_logprobs else None
        events = b""
        for index in range(first_index, first_index + self._num_samples(prompt)):
            choice = self.by_index[index] = Choice(
                prompt=prompt,
                parser=self.ask.reading.new_parser(f"{started.request_id}-{index}"),
                num_prompt_tokens=started.num_prompt_tokens,
                has_prediction=self.ask.requests[prompt].HasField("prediction"),
                logprobs=self.ask.new_logprobs() if self.ask.new_logprobs else None,
                prompt_logprobs=told,
            )
            if self.ask.is_streamed:
                events += self.wire.started(index, choice)
            if self.ask.echoes:
                events += self._echo(index, choice)
        return events

    def _echo(self, index: int, choice: Choice) -> bytes:
        if choice.logprobs is not None:
            choice.logprobs.begin(self.ask.requests[choice.prompt].token_ids.token_ids[0])
        return self._came(index, choice, [Content(self.ask.echoes[choice.prompt])], ())

    def _take_prompt(self, prompt: int, first_index: int, told: types_pb2.PromptLogprobs) -> bytes:
        first = told.first_position
        token_ids = self.ask.requests[prompt].token_ids.token_ids[first : first + len(told.tokens)]
        of_prompt = self.by_index[first_index].prompt_logprobs
        if of_prompt is not None:
            of_prompt.add(token_ids, told.tokens)
        events = b""
        for index in range(first_index, first_index + self._num_samples(prompt)):
            choice = self.by_index[index]
            if choice.logprobs is not None and self.ask.echoes:
                choice.logprobs.add(token_ids, told.tokens)
                events += self._came(index, choice, (), ())
        return events

    def _take_chunk(self, index: int, choice: Choice, chunk: pb.GenerateChunk) -> bytes:
        choice.num_completion_tokens += len(chunk.token_ids)
        if choice.logprobs is not None:
            choice.logprobs.add(chunk.token_ids, chunk.logprobs)
        parts = choice.parser.feed(chunk.token_ids, chunk.text)
        if not chunk.HasField("text"):
            # Without a tokenizer a chunk is all that tells of tokens.
            parts = [Content("")]
        return self._came(index, choice, parts, chunk.token_ids)

    def _take_finished(self, index: int, choice: Choice, finished: pb.GenerateFinished) -> bytes:
        choice.num_completion_tokens = finished.usage.num_completion_tokens
        choice.num_cached_tokens = finished.usage.num_cached_tokens
        choice.num_accepted_prediction_tokens = finished.usage.num_accepted_prediction_tokens
        choice.num_rejected_prediction_tokens = finished.usage.num_rejected_prediction_tokens
        parts = choice.parser.finish(finished.text)
        rest = self._came(index, choice, parts, ()) if parts else b""
        choice.finish_reason = FINISH_REASONS[finished.finish_reason]
        choice.stop = finished.stop if finished.HasField("stop") else None
        if choice.has_calls and choice.finish_reason == "stop":
            choice.finish_reason = "tool_calls"
        if not self.ask.is_streamed:
            return b""
        assert self.wire is not None
        return rest + self.wire.finished(index, choice)

    def _came(
        self, index: int, choice: Choice, parts: Sequence[Part], token_ids: Sequence[int]
    ) -> bytes:
        choice.has_calls = choice.has_calls or any(isinstance(part, ToolCall) for part in parts)
        assert self.wire is not None
        if not self.ask.is_streamed and not self.wire.follows:
            choice.parts += parts
            choice.token_ids += token_ids
            return b""
        return self.wire.came(index, choice, parts, token_ids)


async def _stream(
    run: _Run, responses: AsyncGenerator[tuple[int, pb.GenerateResponse], None], send: Send
) -> None:
    """Headers go out with the first token: what fails before it still gets a status of its own."""
    has_started = False
    held = b""
    try:
        async for index, response in responses:
            event = held + run.take(index, response)
            if not has_started and response.HasField("started"):
                held = event
                continue
            held = b""
            if not has_started:
                has_started = True
                await _send_head(run, send, b"text/event-stream; charset=utf-8")
            if event:
                await send({"type": "http.response.body", "body": event, "more_body": True})
    except Exception as error:
        if not has_started:
            raise
        assert run.wire is not None
        await _send_last(send, run.wire.failed(run.ask.to_error(error)))
        if not isinstance(error, BatonError):
            raise
        return
    assert run.wire is not None
    await _send_last(send, run.wire.ended(run.choices))


async def _send_whole(
    run: _Run, responses: AsyncGenerator[tuple[int, pb.GenerateResponse], None], send: Send
) -> None:
    async for index, response in responses:
        run.take(index, response)
    assert run.wire is not None
    body = run.wire.whole(run.choices)
    await _send_head(run, send, b"application/json", length=len(body))
    await _send_last(send, body)


async def _send_head(run: _Run, send: Send, kind: bytes, *, length: int | None = None) -> None:
    headers = [(b"content-type", kind)]
    headers += [(name, run.request_id.encode()) for name in run.ask.id_headers]
    headers.append((b"cache-control", b"no-store"))
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    else:
        # Proxies that know it pass a stream on as it comes.
        headers.append((b"x-accel-buffering", b"no"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_last(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": False})
