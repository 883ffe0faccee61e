"""A service of its own in front of Baton: sums up texts of any length, piece by piece.

pip install ./clients/python fastapi uvicorn
BATON_TARGET=127.0.0.1:50051 python -m uvicorn examples.summary_service:app --port 8080
curl -N 127.0.0.1:8080/summaries --data-binary @README.md

It shows what a service needs besides the call itself: one client for the whole process, one
deadline for all that a request asks, statuses for what goes wrong, and an end to the work when
nobody listens any more.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from baton_client import (
    AsyncClient,
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Unavailable,
)
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse

QUESTION = "\n\nIn short:"
NUM_ANSWER_TOKENS = 48
MAX_TEXT_BYTES = 256 * 1024
DEADLINE_S = 120.0
_SPARE_TOKENS = 8
"""Text that is cut and tokenised again may have a few tokens more."""

_STATUSES: dict[type[BatonError], int] = {
    InvalidRequest: 400,
    Unavailable: 503,
    Cancelled: 503,
    DeadlineExceeded: 504,
}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    token = os.environ.get("BATON_TOKEN")
    target = os.environ.get("BATON_TARGET", "127.0.0.1:50051")
    async with AsyncClient(target, tls=token is not None, token=token) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.exception_handler(BatonError)
async def on_error(request: Request, error: BatonError) -> Response:
    return PlainTextResponse(f"{error}\n", _STATUSES.get(type(error), 502))


@app.post("/summaries")
async def summaries(request: Request) -> Response:
    """The body is the text; the answer is plain text, streamed."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_TEXT_BYTES:
            return PlainTextResponse(f"at most {MAX_TEXT_BYTES} bytes\n", 413)
    text = body.decode(errors="replace").strip()
    if not text:
        return PlainTextResponse("the text is empty\n", 400)
    parts = summarise(request.app.state.client, text)
    # Once the first part is there, the status is certain.
    first = await anext(parts, "")
    return StreamingResponse(joined(first, parts), media_type="text/plain")


@app.get("/health")
async def health(request: Request) -> Response:
    client: AsyncClient = request.app.state.client
    await client.wait_ready(deadline_s=1)
    return PlainTextResponse("ok\n")


async def summarise(client: AsyncClient, text: str) -> AsyncGenerator[str, None]:
    """What the model says of each piece, as it comes; an empty line between them."""
    deadline = time.monotonic() + DEADLINE_S
    for number, piece in enumerate(await pieces(client, text)):
        if number:
            yield "\n\n"
        stream = client.generate(
            piece + QUESTION,
            max_tokens=NUM_ANSWER_TOKENS,
            temperature=0,
            deadline_s=deadline - time.monotonic(),
        )
        # Leaving the block ends the work, also when the reader went away.
        async with stream:
            async for chunk in stream:
                if chunk.text:
                    yield chunk.text


async def pieces(client: AsyncClient, text: str) -> list[str]:
    """The text in pieces that fit into the model together with question and answer."""
    info = await client.model_info()
    num_question = len(await client.tokenize(QUESTION))
    size = info.max_model_len - num_question - NUM_ANSWER_TOKENS - _SPARE_TOKENS
    token_ids = await client.tokenize(text, add_special_tokens=False)
    starts = range(0, len(token_ids), size)
    return [await client.detokenize(token_ids[start : start + size]) for start in starts]


async def joined(first: str, rest: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with aclosing(rest):
        yield first
        try:
            async for part in rest:
                yield part
        except BatonError as error:
            # The status is sent; a reader of plain text still has to see that something is missing.
            yield f"\n[{error}]\n"
