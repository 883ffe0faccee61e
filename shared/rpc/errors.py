"""The one exception tree, and its one mapping to status codes.

    BatonError
    ├── InvalidField          a request field is out of range
    ├── NoTokenizer           text asked of a model directory without tokenizer
    ├── NoChatTemplate        a chat asked of one whose template cannot be used
    ├── Draining              the process is shutting down
    ├── Overloaded            too much is under way; the same request may succeed later
    ├── DeadlineExceeded      the request's own deadline
    ├── CapabilityMismatch    model, layout or dtype differ
    ├── ModelReplaced         the cluster serves another model, also one that an answer began on
    ├── TooManyAttempts       the request keeps meeting dying workers
    └── AttemptFailed         one attempt ended; the gateway may start another
        ├── StaleAttempt      a higher attempt, or a cancel, was seen before
        ├── Preempted         a running sequence found no free block, or lost its state
        ├── DigestMismatch    a block's bytes are not those that were sealed
        ├── ClaimBroken       the claim on the source's blocks did not hold
        ├── SourceLost        the source of the blocks is gone or silent
        ├── WorkerLost        the worker itself is gone or silent
        ├── EngineFailure     the engine could not compute the sequence
        └── Cancelled         by the sender

Servicers raise; `ErrorInterceptor` (serve.py) turns what they raise into status codes. On the
multiplexed streams `to_failure` and `from_failure` carry the same tree as messages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import ClassVar

import grpc
from google.protobuf import any_pb2
from google.rpc import status_pb2

from baton.shared.telemetry import log_event
from baton.v1 import error_details_pb2 as pb

logger = logging.getLogger(__name__)

_DETAILS_KEY = "grpc-status-details-bin"

HTTP_STATUS: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    # Not 501: clients repeat what failed with 500 or more, and this can never succeed.
    grpc.StatusCode.UNIMPLEMENTED: 400,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.ABORTED: 503,
    grpc.StatusCode.FAILED_PRECONDITION: 503,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""The HTTP status for each status code of this tree."""


class BatonError(Exception):
    """The base of all. The message is one line that a client may see."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[pb.FailureReason] = pb.FAILURE_REASON_UNSPECIFIED

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidField(BatonError):
    """`field` is the request's; `limit` says what would have been accepted."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = pb.FAILURE_REASON_BAD_FIELD
    context_length: int | None = None
    """Where prompt and answer together are too long: the tokens that they may have. HTTP clients
    tell this from the others; it does not travel between processes."""

    def __init__(
        self, field: str, problem: str, *, limit: str, context_length: int | None = None
    ) -> None:
        super().__init__(f"{field} {problem}; limit: {limit}")
        self.field = field
        self.limit = limit
        self.context_length = context_length


class NoTokenizer(BatonError):
    code = grpc.StatusCode.UNIMPLEMENTED
    reason = pb.FAILURE_REASON_NO_TOKENIZER


class NoChatTemplate(BatonError):
    code = grpc.StatusCode.UNIMPLEMENTED
    reason = pb.FAILURE_REASON_NO_CHAT_TEMPLATE


class Draining(BatonError):
    code = grpc.StatusCode.UNAVAILABLE
    reason = pb.FAILURE_REASON_DRAINING


class Overloaded(BatonError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = pb.FAILURE_REASON_OVERLOADED


class DeadlineExceeded(BatonError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = pb.FAILURE_REASON_DEADLINE


class CapabilityMismatch(BatonError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = pb.FAILURE_REASON_CAPABILITY_MISMATCH


class ModelReplaced(BatonError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = pb.FAILURE_REASON_MODEL_REPLACED


class TooManyAttempts(BatonError):
    code = grpc.StatusCode.INTERNAL
    reason = pb.FAILURE_REASON_TOO_MANY_ATTEMPTS


class AttemptFailed(BatonError):
    pass


class StaleAttempt(AttemptFailed):
    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = pb.FAILURE_REASON_STALE_ATTEMPT


class Preempted(AttemptFailed):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = pb.FAILURE_REASON_PREEMPTED


class DigestMismatch(AttemptFailed):
    code = grpc.StatusCode.DATA_LOSS
    reason = pb.FAILURE_REASON_DIGEST_MISMATCH


class ClaimBroken(AttemptFailed):
    code = grpc.StatusCode.ABORTED
    reason = pb.FAILURE_REASON_CLAIM_BROKEN


class SourceLost(AttemptFailed):
    code = grpc.StatusCode.UNAVAILABLE
    reason = pb.FAILURE_REASON_SOURCE_LOST


class WorkerLost(AttemptFailed):
    code = grpc.StatusCode.UNAVAILABLE
    reason = pb.FAILURE_REASON_WORKER_LOST


class EngineFailure(AttemptFailed):
    code = grpc.StatusCode.INTERNAL
    reason = pb.FAILURE_REASON_ENGINE


class Cancelled(AttemptFailed):
    code = grpc.StatusCode.CANCELLED
    reason = pb.FAILURE_REASON_CANCELLED


def _leaves(kind: type[BatonError]) -> list[type[BatonError]]:
    return [kind] + [leaf for child in kind.__subclasses__() for leaf in _leaves(child)]


_BY_REASON = {kind.reason: kind for kind in _leaves(BatonError) if kind.reason}


def to_failure(error: BatonError) -> pb.Failure:
    failure = pb.Failure(reason=error.reason, message=error.message)
    if isinstance(error, InvalidField):
        failure.field, failure.limit = error.field, error.limit
    return failure


def from_failure(failure: pb.Failure) -> BatonError:
    kind = _BY_REASON.get(failure.reason, BatonError)
    error = kind.__new__(kind)
    BatonError.__init__(error, failure.message)
    if isinstance(error, InvalidField):
        error.field, error.limit = failure.field, failure.limit
    return error


def to_status(error: BatonError) -> status_pb2.Status:
    """A `google.rpc.Status` with the typed detail, for the trailers of an RPC that fails."""
    detail = any_pb2.Any()
    detail.Pack(to_failure(error))
    return status_pb2.Status(code=error.code.value[0], message=error.message, details=[detail])


def trailers(error: BatonError) -> tuple[tuple[str, bytes], ...]:
    return ((_DETAILS_KEY, to_status(error).SerializeToString()),)


def from_rpc_error(error: grpc.aio.AioRpcError) -> BatonError:
    """The error that the server raised; `WorkerLost` when it carries no detail of ours.

    gRPC's own text names addresses: it stays in the log.
    """
    failure = failure_of(error)
    if failure is not None:
        return from_failure(failure)
    log_event(
        logger, logging.INFO, "call failed", status=error.code().name, message=error.details()
    )
    return WorkerLost(f"the call ended with {error.code().name}")


def failure_of(error: grpc.aio.AioRpcError) -> pb.Failure | None:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                failure = pb.Failure()
                if detail.Unpack(failure):
                    return failure
    return None
