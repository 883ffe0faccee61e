"""An endpoint that answers at once with made-up tokens, one a message. Against it is measured what
a load generator can drive.

    python -m baton.loadtest.null_server --scheme grpc|http [--gap-ms 20]

Prints `READY SCHEME://HOST:PORT`, and serves on loopback until a signal comes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import grpc
import uvloop

from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc as pb_grpc

MODEL = "null-model"
MAX_MODEL_LEN = 1 << 20
_HOST = "127.0.0.1"
_CACHED_TOKENS = 16


class NullInference(pb_grpc.InferenceServiceServicer):
    def __init__(self, gap_s: float = 0.0) -> None:
        self._gap_s = gap_s

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        num_tokens = request.sampling.max_tokens
        num_prompt_tokens = len(request.token_ids.token_ids)
        started = pb.GenerateStarted(request_id="null", num_prompt_tokens=num_prompt_tokens)
        yield pb.GenerateResponse(started=started)
        for index in range(num_tokens):
            await asyncio.sleep(self._gap_s)
            yield pb.GenerateResponse(
                chunk=pb.GenerateChunk(first_index=index, token_ids=[7], text=" tok")
            )
        finished = pb.GenerateFinished(
            finish_reason=cast(Any, 2),
            usage=pb.Usage(
                num_prompt_tokens=num_prompt_tokens,
                num_completion_tokens=num_tokens,
                num_cached_tokens=min(_CACHED_TOKENS, num_prompt_tokens),
            ),
            prefill_worker_id="null",
            decode_worker_id="null",
            num_attempts=1,
        )
        finished.timing.transfer_time.FromMilliseconds(3)
        yield pb.GenerateResponse(finished=finished)

    async def Tokenize(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a null server")

    Detokenize = GetServerInfo = Tokenize

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Any
    ) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(
            model_name=MODEL, max_model_len=MAX_MODEL_LEN, vocab_size=1024
        )


class NullHttp(asyncio.Protocol):
    """Knows no more of HTTP than the generator's own requests need."""

    def __init__(self, gap_s: float = 0.0) -> None:
        self._gap_s = gap_s
        self._buffer = bytearray()
        self._has_body = True
        self._transport: asyncio.Transport | None = None
        self._answers: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self._answers:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end]).decode("latin-1").lower().split("\r\n")
        lengths = [line.partition(":")[2] for line in head if line.startswith("content-length:")]
        whole = end + 4 + int(lengths[0] if lengths else 0)
        if len(self._buffer) < whole:
            return
        body = bytes(self._buffer[end + 4 : whole])
        del self._buffer[:whole]
        method, path, *_ = head[0].split(" ")
        self._has_body = method != "head"
        task = asyncio.get_running_loop().create_task(self._answer(path, body))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, path: str, body: bytes) -> None:
        if path == "/v1/models":
            models = [{"id": MODEL, "object": "model", "max_model_len": MAX_MODEL_LEN}]
            self._say(200, {"object": "list", "data": models})
        elif path == "/health":
            self._say(200, {})
        elif path == "/tokenize":
            text = json.loads(body)["prompt"]
            self._say(200, {"tokens": [7] * text.count(" tok")})
        elif path == "/v1/completions":
            await self.complete(json.loads(body))
        else:
            self._say(404, {"error": {"message": f"no such path: {path}"}})

    async def complete(self, request: dict[str, Any]) -> None:
        self.begin_stream()
        num_prompt_tokens = len(request["prompt"])
        num_tokens = request["max_tokens"]
        for count in range(1, num_tokens + 1):
            await asyncio.sleep(self._gap_s)
            reason = "length" if count == num_tokens else None
            choice = {"index": 0, "text": " tok", "logprobs": None, "finish_reason": reason}
            self.say_event([choice], num_prompt_tokens, count)
        self.say_event([], num_prompt_tokens, num_tokens)
        self.write_chunk(b"data: [DONE]\n\n")
        self.write_chunk(b"")

    def begin_stream(self) -> None:
        self.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )

    def say_event(self, choices: list[Any], num_prompt_tokens: int, count: int) -> None:
        event = {
            "id": "cmpl-null",
            "object": "text_completion",
            "created": 0,
            "model": MODEL,
            "choices": choices,
            "usage": {
                "prompt_tokens": num_prompt_tokens,
                "completion_tokens": count,
                "total_tokens": num_prompt_tokens + count,
                "prompt_tokens_details": {"cached_tokens": min(_CACHED_TOKENS, num_prompt_tokens)},
            },
        }
        self.write_chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def write_chunk(self, data: bytes) -> None:
        self.write(b"%x\r\n%s\r\n" % (len(data), data))

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _say(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n" % status)
        self.write(b"content-length: %d\r\n\r\n%s" % (len(data), data * self._has_body))


async def start_grpc(gap_s: float = 0.0) -> tuple[grpc.aio.Server, str]:
    """A server on a free port of loopback, and its target."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_InferenceServiceServicer_to_server(NullInference(gap_s), server)
    port = server.add_insecure_port(f"{_HOST}:0")
    await server.start()
    return server, f"grpc://{_HOST}:{port}"


async def start_http(gap_s: float = 0.0) -> tuple[asyncio.Server, str]:
    """A server on a free port of loopback, and its target."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: NullHttp(gap_s), _HOST, 0)
    return server, f"http://{_HOST}:{server.sockets[0].getsockname()[1]}"


async def _serve(scheme: str, gap_s: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if scheme == "grpc":
        grpc_server, target = await start_grpc(gap_s)
        print(f"READY {target}", flush=True)
        await stop.wait()
        await grpc_server.stop(0)
    else:
        http_server, target = await start_http(gap_s)
        print(f"READY {target}", flush=True)
        await stop.wait()
        http_server.close()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m baton.loadtest.null_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scheme", choices=("grpc", "http"), default="grpc")
    parser.add_argument("--gap-ms", type=float, default=0.0, help="between two tokens")
    args = parser.parse_args(argv)
    uvloop.run(_serve(args.scheme, args.gap_ms / 1e3))


if __name__ == "__main__":
    main()
