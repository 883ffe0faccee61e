"""The gateway that a client command talks to."""

from __future__ import annotations

import sys

import grpc

DEFAULT_TARGET = "127.0.0.1:50051"
# A chunk of an answer is small; the snapshot of a large cluster may be large.
_MAX_MESSAGE_BYTES = 64 << 20


def connect(target: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        target,
        options=[
            # A proxy of the environment is meant for the web, not for our port.
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ],
    )


def report(error: grpc.aio.AioRpcError, target: str) -> int:
    """Prints one line, `CODE: message`, on standard error; returns the exit code."""
    hint = "; `baton up --model DIR` starts a server, --target names one"
    problem = what_failed(error, target, when_nobody_listens=hint)
    print(problem, file=sys.stderr)
    return 1


def what_failed(error: grpc.aio.AioRpcError, target: str, *, when_nobody_listens: str = "") -> str:
    """`CODE: message`, in one line."""
    message = " ".join((error.details() or "no message").split())
    if "Connection refused" in message:
        message = f"nobody listens on {target}{when_nobody_listens}"
    return f"{error.code().name}: {message}"
