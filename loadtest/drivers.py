"""How a prompt is asked over gRPC, and over OpenAI's HTTP API, behind one interface."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import grpc

from baton.loadtest.http_stream import HttpBroken, HttpClient
from baton.loadtest.samples import OK, Watch
from baton.loadtest.sse import EventReader, EventTooLong
from baton.loadtest.target import CHANNEL_OPTIONS, Target
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2

_GENERATE = "/baton.v1.InferenceService/Generate"
_MAX_DETAIL = 200


class Driver(Protocol):
    def encode(self, prompt: Sequence[int], max_tokens: int) -> bytes:
        """A request, ready to be sent, for a greedy answer of `output_tokens` tokens."""

    async def ask(self, request: bytes, watch: Watch, answer: list[int] | None = None) -> None:
        """Reads one answer: times and counts go to the sample of `watch`, tokens to `answer`. What
        goes wrong becomes the sample's status."""

    async def close(self) -> None: ...


def driver_for(target: Target, model: str) -> Driver:
    return GrpcDriver(target) if target.is_grpc else OpenAiDriver(target, model)


def request_of(prompt: Sequence[int], max_tokens: int, **sampling: Any) -> pb.GenerateRequest:
    """Asks for greedy answers of the wanted length, unless `sampling` says otherwise."""
    fields: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(token_ids=prompt),
        sampling=types_pb2.SamplingParams(max_tokens=max_tokens, **fields),
    )


class GrpcDriver:
    def __init__(self, target: Target) -> None:
        self._channel = grpc.aio.insecure_channel(target.address, options=CHANNEL_OPTIONS)
        # Requests have been turned into bytes before.
        self._generate: Any = self._channel.unary_stream(
            _GENERATE, response_deserializer=pb.GenerateResponse.FromString
        )

    def encode(self, prompt: Sequence[int], max_tokens: int) -> bytes:
        return request_of(prompt, max_tokens).SerializeToString()

    async def ask(self, request: bytes, watch: Watch, answer: list[int] | None = None) -> None:
        sample = watch.sample
        try:
            async for response in self._generate(request):
                if response.HasField("chunk"):
                    token_ids = response.chunk.token_ids
                    if token_ids:
                        watch.took(len(token_ids))
                    if answer is not None:
                        answer += token_ids
                elif response.HasField("finished"):
                    finished = response.finished
                    sample.is_local = not finished.prefill_worker_id
                    sample.num_attempts = finished.num_attempts
                    sample.num_prompt_tokens = finished.usage.num_prompt_tokens
                    sample.num_cached_tokens = finished.usage.num_cached_tokens
                    if finished.timing.HasField("transfer_time"):
                        nanos = finished.timing.transfer_time.ToNanoseconds()
                        sample.transfer_s = nanos / 1e9
                    sample.status = OK
        except grpc.aio.AioRpcError as error:
            sample.status = error.code().name
            sample.detail = _one_line(error.details() or "")

    async def close(self) -> None:
        await self._channel.close()


class OpenAiDriver:
    """Streams /v1/completions with prompts of token ids. How many tokens a message brings is what
    its usage says (continuous_usage_stats); a server that does not tell gets one for each message
    with text, until the usage at the end."""

    def __init__(self, target: Target, model: str) -> None:
        self._model = model
        self._client = HttpClient(target.host, target.port, tls=target.scheme == "https")

    def encode(self, prompt: Sequence[int], max_tokens: int) -> bytes:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        return self._client.encode("/v1/completions", _json(body))

    async def ask(self, request: bytes, watch: Watch, answer: list[int] | None = None) -> None:
        stream = _CompletionStream(watch)
        sample = watch.sample
        try:
            status = await self._client.exchange(request, stream.feed)
            if status != 200:
                sample.status = f"HTTP {status}"
                sample.detail = _problem(bytes(stream.raw))
                return
            stream.finish()
            if answer is not None and sample.status == OK:
                answer += await self._token_ids("".join(stream.texts))
        except (HttpBroken, OSError) as error:
            sample.status, sample.detail = "CONNECTION", _one_line(str(error))
        except (EventTooLong, ValueError, KeyError, TypeError, AttributeError) as error:
            sample.status, sample.detail = "NOT_OPENAI", _one_line(repr(error))

    async def _token_ids(self, text: str) -> list[int]:
        """The tokens of an answer, for the next turn. Raises HttpBroken, OSError, ValueError,
        KeyError."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        raw = bytearray()
        status = await self._client.exchange(
            self._client.encode("/tokenize", _json(body)), raw.extend
        )
        if status != 200:
            raise ValueError(f"/tokenize answers {status}, and a next turn needs it")
        token_ids: list[int] = json.loads(bytes(raw))["tokens"]
        return token_ids

    async def close(self) -> None:
        self._client.close()


class _CompletionStream:
    def __init__(self, watch: Watch) -> None:
        self.raw = bytearray()
        """What an answer says that is no stream, and so an error."""
        self.texts: list[str] = []
        self._watch = watch
        self._events = EventReader()
        self._num_tokens = 0
        self._is_finished = False
        self._error = ""

    def feed(self, data: bytes) -> None:
        """Raises EventTooLong, ValueError or AttributeError for an event that is not OpenAI's."""
        if len(self.raw) < 4096:
            self.raw += data
        for event in self._events.feed(data):
            if event != b"[DONE]":
                self._take(json.loads(event))

    def _take(self, event: dict[str, Any]) -> None:
        if error := event.get("error"):
            self._error = str(error.get("message", error))
            return
        usage, text = event.get("usage"), ""
        for choice in event.get("choices", ()):
            text += choice.get("text") or ""
            if choice.get("finish_reason"):
                self._is_finished = True
        if text:
            self.texts.append(text)
        if usage is None:
            num_new = 1 if text else 0
        else:
            num_new = usage["completion_tokens"] - self._num_tokens
            self._take_usage(usage)
        if num_new > 0 and event.get("choices"):
            self._num_tokens += num_new
            self._watch.took(num_new)

    def _take_usage(self, usage: dict[str, Any]) -> None:
        sample = self._watch.sample
        sample.num_prompt_tokens = usage["prompt_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        sample.num_cached_tokens = details.get("cached_tokens", sample.num_cached_tokens)
        self._last_usage = usage

    _last_usage: dict[str, Any] | None = None

    def finish(self) -> None:
        sample = self._watch.sample
        if self._last_usage is not None:
            sample.num_tokens = self._last_usage["completion_tokens"]
        if self._error:
            sample.status, sample.detail = "ERROR_IN_STREAM", _one_line(self._error)
        elif self._is_finished:
            sample.status = OK
        else:
            sample.status, sample.detail = "CUT_SHORT", "the stream ended without a finish_reason"


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _problem(raw: bytes) -> str:
    try:
        return _one_line(str(json.loads(raw)["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return _one_line(raw.decode(errors="replace"))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_DETAIL]
