"""Client of Baton.

    from baton_client import Client

    with Client("127.0.0.1:50051") as client:
        for chunk in client.generate("In the beginning", max_tokens=32, temperature=0):
            print(chunk.text, end="", flush=True)

`AsyncClient` has the same surface, to be awaited. The stubs of the contract are in
`baton_client.v1`, its .proto files under `proto_path()`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from baton_client.aio import AsyncAnswerStream, AsyncClient
from baton_client.answer import Answer, Chunk, Timing, TokenLogprobs, Usage
from baton_client.client import AnswerStream, Client
from baton_client.connection import Tls
from baton_client.errors import (
    AccessDenied,
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ServerError,
    Unavailable,
    Unsupported,
)
from baton_client.retry import NO_RETRY, RetryPolicy

__all__ = [
    "NO_RETRY",
    "AccessDenied",
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncClient",
    "BatonError",
    "Cancelled",
    "Chunk",
    "Client",
    "DeadlineExceeded",
    "InvalidRequest",
    "RetryPolicy",
    "ServerError",
    "Timing",
    "Tls",
    "TokenLogprobs",
    "Unavailable",
    "Unsupported",
    "Usage",
    "proto_path",
]

try:
    __version__ = version("baton-client")
except PackageNotFoundError:  # imported from a source tree
    __version__ = "unknown"


def proto_path() -> Path:
    """Where `baton/v1/*.proto` lie, for protoc's --proto_path."""
    return Path(__file__).parent / "protos"
