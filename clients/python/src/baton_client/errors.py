"""What calls raise.

BatonError
├── InvalidRequest      a field is out of its range: `field`, `limit`
├── Unsupported         the model or the server cannot do that: it has no tokenizer, say
├── AccessDenied        the token or the certificate is missing, or does not suffice
├── DeadlineExceeded    `deadline_s` has passed
├── Cancelled           by this side: `cancel()`, or the client was closed
├── Unavailable         nobody there, or gone for longer than retries last
└── ServerError         the server failed, or says what does not fit together
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError

from baton_client.v1 import error_details_pb2
from baton_client.wire_pb2 import Status

if TYPE_CHECKING:
    Metadata = Iterable[tuple[str, str | bytes]]

_DETAILS_KEY = "grpc-status-details-bin"


class BatonError(Exception):
    """Base of all. `message` is one line for people."""

    def __init__(self, message: str, *, code: grpc.StatusCode, reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        """baton.v1.FailureReason without its prefix (`WORKER_LOST`); empty when the server gave
        none, as a connection that broke does not."""

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


class InvalidRequest(BatonError):
    def __init__(self, message: str, *, field: str, limit: str, reason: str = "BAD_FIELD") -> None:
        super().__init__(message, code=grpc.StatusCode.INVALID_ARGUMENT, reason=reason)
        self.field = field
        """As the contract names it (`sampling.top_p`); empty when the server did not say."""
        self.limit = limit
        """What would have been accepted."""


class Unsupported(BatonError):
    pass


class AccessDenied(BatonError):
    pass


class DeadlineExceeded(BatonError):
    pass


class Cancelled(BatonError):
    pass


class Unavailable(BatonError):
    pass


class ServerError(BatonError):
    pass


_BY_CODE: dict[grpc.StatusCode, type[BatonError]] = {
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


def from_rpc_error(error: grpc.RpcError) -> BatonError:
    """The error that a call ended with, of either kind of channel."""
    # Neither kind has a class in common that says so, but both have these.
    assert isinstance(error, (grpc.Call, grpc.aio.AioRpcError))
    return from_status(error.code(), error.details(), error.trailing_metadata() or ())


def from_status(code: grpc.StatusCode, details: str | None, metadata: Metadata = ()) -> BatonError:
    """`metadata` is the trailing one, where the server tells more."""
    failure = _failure_in(metadata)
    message = failure.message or details or "no message"
    reason = "" if not failure.reason else _reason_name(failure.reason)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(message, field=failure.field, limit=failure.limit, reason=reason)
    return _BY_CODE.get(code, ServerError)(message, code=code, reason=reason)


def cancelled(message: str) -> Cancelled:
    return Cancelled(message, code=grpc.StatusCode.CANCELLED)


def misfit(message: str) -> ServerError:
    """For messages that break the contract."""
    return ServerError(message, code=grpc.StatusCode.INTERNAL)


def cut_off() -> Unavailable:
    """For a stream that ended with OK before its answer was finished."""
    return Unavailable("the stream ended early", code=grpc.StatusCode.UNAVAILABLE)


def _failure_in(metadata: Metadata) -> error_details_pb2.Failure:
    """Empty when there is none."""
    failure = error_details_pb2.Failure()
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            # What a proxy sends may be anything.
            with contextlib.suppress(DecodeError):
                for detail in Status.FromString(value).details:
                    if detail.Unpack(failure):
                        return failure
    return error_details_pb2.Failure()


def _reason_name(reason: error_details_pb2.FailureReason) -> str:
    try:
        name = error_details_pb2.FailureReason.Name(reason)
    except ValueError:  # of a newer server
        return str(int(reason))
    return name.removeprefix("FAILURE_REASON_")
