"""The body of a request: read in bounded memory and time, then parsed."""

from __future__ import annotations

import asyncio
import codecs
import json
import re
import zlib
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from baton.services.gateway.openai.errors import HttpError
from baton.shared.rpc.serve import PUBLIC_MESSAGE_BYTES

MAX_BODY_BYTES = PUBLIC_MESSAGE_BYTES
"""Parsing holds up every other stream: by 0.2 s at worst at this size (a million empty lists)."""
BODY_LIMIT_S = 30.0
_MAX_SKIPPED_BYTES = 16 * MAX_BODY_BYTES
"""A body that is too long is still received up to this size, and thrown away: a client that writes
everything before it reads would otherwise meet a broken connection instead of the answer."""

_MAYBE_INFINITE = re.compile(rb"[eE]\+?\d{3}|(?<!\d)\d{200}")
"""What has no such text has no number beyond those of 64 bits: `1e999` is read as infinite."""

_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32
"""Both are told by their first bytes."""


async def read_json(request: Request) -> dict[str, Any]:
    """Raises HttpError: 400 for what is no JSON object, 408, 413, 415."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        message = f"content-encoding {encoding[:40]!r} is not supported; gzip and deflate are"
        raise HttpError(415, message, code="unsupported_encoding")
    body = await _read(request)
    if encoding not in ("", "identity"):
        body = _inflate(body)
    try:
        body = body.removeprefix(codecs.BOM_UTF8)
        parsed = from_json(body, allow_inf_nan=False, cache_strings="none")
        if _MAYBE_INFINITE.search(body):
            json.dumps(parsed, allow_nan=False)
    except ValueError as error:
        message = f"the body is not valid JSON: {error}"
        raise HttpError(400, message, code="invalid_json") from None
    if not isinstance(parsed, dict):
        raise HttpError(400, "the body must be a JSON object", code="invalid_json")
    return parsed


async def _read(request: Request) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        if int(request.headers.get("content-length", 0)) > _MAX_SKIPPED_BYTES:
            raise _too_large()
        async with asyncio.timeout(BODY_LIMIT_S):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > _MAX_SKIPPED_BYTES:
                    raise _too_large()
                if num_bytes <= MAX_BODY_BYTES:
                    chunks.append(chunk)
                else:
                    chunks.clear()
    except TimeoutError:
        message = f"the body did not arrive within {BODY_LIMIT_S:g} s"
        raise HttpError(408, message, code="timeout") from None
    except ClientDisconnect:
        raise HttpError(499, "the client went away", code="cancelled") from None
    if num_bytes > MAX_BODY_BYTES:
        raise _too_large()
    return b"".join(chunks)


def _inflate(body: bytes) -> bytes:
    """No more than a body may have, however small it came."""
    chunks: list[bytes] = []
    num_left = MAX_BODY_BYTES + 1
    try:
        while body and num_left:
            # A gzip file may be several in a row.
            member = zlib.decompressobj(_GZIP_OR_ZLIB)
            chunks.append(member.decompress(body, num_left))
            num_left -= len(chunks[-1])
            if num_left and not member.eof:
                raise zlib.error("it is cut off")
            body = member.unused_data
    except zlib.error as error:
        message = f"the body is not what its content-encoding says: {error}"
        raise HttpError(400, message, code="invalid_encoding") from None
    if not num_left:
        raise _too_large()
    return b"".join(chunks)


def _too_large() -> HttpError:
    message = f"the body is too large; limit: {MAX_BODY_BYTES} bytes"
    return HttpError(413, message, code="body_too_large")
