"""One tree of exceptions, one mapping: class ↔ Failure ↔ status."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import status_pb2

from baton.shared.rpc import errors
from baton.shared.rpc.errors import (
    AttemptFailed,
    BatonError,
    InvalidField,
    WorkerLost,
    failure_of,
    from_failure,
    from_rpc_error,
    to_failure,
    to_status,
    trailers,
)
from baton.v1 import error_details_pb2 as pb

PROTO = Path(__file__).parents[3] / "protos/baton/v1/error_details.proto"


def descendants(kind: type[BatonError]) -> list[type[BatonError]]:
    return [leaf for child in kind.__subclasses__() for leaf in (child, *descendants(child))]


LEAVES = [kind for kind in descendants(BatonError) if kind is not AttemptFailed]


def make(kind: type[BatonError]) -> BatonError:
    if issubclass(kind, InvalidField):
        return kind("sampling.top_p", "is 3.0", limit="(0, 1]")
    return kind("what happened")


def rpc_error(error: BatonError) -> grpc.aio.AioRpcError:
    """What a client of a server that raised `error` catches."""
    return grpc.aio.AioRpcError(
        error.code,
        initial_metadata=grpc.aio.Metadata(),
        trailing_metadata=grpc.aio.Metadata(*cast(Any, trailers(error))),
        details=error.message,
    )


def assert_same(found: BatonError, error: BatonError) -> None:
    assert type(found) is type(error)
    assert found.message == error.message == str(found)
    if isinstance(error, InvalidField):
        assert isinstance(found, InvalidField)
        assert (found.field, found.limit) == (error.field, error.limit)


@pytest.mark.parametrize("kind", LEAVES)
def test_every_class_survives_the_way_through_a_message(kind: type[BatonError]) -> None:
    error = make(kind)
    wire = to_failure(error).SerializeToString()
    assert_same(from_failure(pb.Failure.FromString(wire)), error)


@pytest.mark.parametrize("kind", LEAVES)
def test_every_class_survives_the_way_through_a_status(kind: type[BatonError]) -> None:
    error = make(kind)
    assert_same(from_rpc_error(rpc_error(error)), error)
    assert to_status(error).code == error.code.value[0]
    assert to_status(error).message == error.message


def test_each_reason_has_exactly_one_class() -> None:
    reasons = [kind.reason for kind in LEAVES]
    assert sorted(reasons) == sorted(set(pb.FailureReason.values()) - {0})


def test_the_status_code_is_the_one_that_the_contract_names() -> None:
    """error_details.proto says it in the comment of each reason, for clients in any language."""
    proto = PROTO.read_text()
    line = r"[^\n]*\n  "
    contract = re.findall(rf"// ([A-Z_]+): {line}(?:// {line})*FAILURE_REASON_(\w+) = ", proto)
    codes = {pb.FailureReason.Name(kind.reason): kind.code.name for kind in LEAVES}
    assert codes == {f"FAILURE_REASON_{reason}": code for code, reason in contract}


def test_a_reason_of_a_newer_version_is_an_error_all_the_same() -> None:
    unknown = pb.Failure(reason=cast(Any, 4711), message="from the future")
    found = from_failure(unknown)
    assert type(found) is BatonError and found.message == "from the future"


def test_a_bad_field_is_named_with_its_limit() -> None:
    failure = to_failure(make(InvalidField))
    assert failure.field == "sampling.top_p" and failure.limit == "(0, 1]"
    assert failure.message == "sampling.top_p is 3.0; limit: (0, 1]"


def test_an_error_of_the_connection_is_a_lost_worker() -> None:
    broken = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "connect 10.0.0.7"
    )
    found = from_rpc_error(broken)
    assert type(found) is WorkerLost and "UNAVAILABLE" in found.message
    assert "10.0.0.7" not in found.message, "a client may see the message"


def test_details_of_others_are_passed_over() -> None:
    foreign = any_pb2.Any(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"")
    status = status_pb2.Status(code=14, details=[foreign]).SerializeToString()
    metadata = grpc.aio.Metadata(("server", "proxy"), cast(Any, (errors._DETAILS_KEY, status)))
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), metadata, "from a proxy"
    )
    assert failure_of(error) is None
    assert type(from_rpc_error(error)) is WorkerLost
