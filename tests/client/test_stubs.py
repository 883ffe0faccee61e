"""The client's own stubs: those of the contract, beside the server's in one process."""

from __future__ import annotations

from pathlib import Path

import baton_client
import pytest
from baton_client import wire_pb2
from baton_client.sampling import Sampling
from baton_client.v1 import error_details_pb2 as client_error_details_pb2
from baton_client.v1 import inference_service_pb2 as client_inference_service_pb2
from baton_client.v1 import types_pb2 as client_types_pb2
from google.protobuf.descriptor import Descriptor
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2

from baton.v1 import error_details_pb2, inference_service_pb2, types_pb2
from tests.device import ROOT

PAIRS = [
    (types_pb2, client_types_pb2),
    (error_details_pb2, client_error_details_pb2),
    (inference_service_pb2, client_inference_service_pb2),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: str(pair[0].__name__))
def test_same_contract(pair: tuple[object, object]) -> None:
    """`make client-stubs` writes those of the client anew."""
    server, client = (stub.DESCRIPTOR for stub in pair)  # type: ignore[attr-defined]
    assert server.name == client.name
    assert server.serialized_pb == client.serialized_pb


def test_message_of_one_is_read_by_the_other() -> None:
    sent = client_inference_service_pb2.GenerateRequest(text="x", received_token_ids=[1, 2])
    sent.sampling.seed = 1 << 63
    read = inference_service_pb2.GenerateRequest.FromString(sent.SerializeToString())
    assert (read.text, list(read.received_token_ids)) == ("x", [1, 2])
    assert read.sampling.seed == 1 << 63


def test_every_sampling_field_is_an_argument() -> None:
    """`make client-stubs` writes these as well."""
    fields = types_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    assert list(Sampling.__annotations__) == list(fields)


def test_contract_is_package_data() -> None:
    carried = sorted(baton_client.proto_path().rglob("*.proto"))
    assert len(carried) == len(PAIRS)
    for path in carried:
        original = ROOT / "protos" / path.relative_to(baton_client.proto_path())
        assert path.read_bytes() == original.read_bytes(), "make client-stubs"


def test_nothing_else_is_imported() -> None:
    """Stubs must not reach for the server's package."""
    package = Path(baton_client.__file__).parent
    for path in [*package.rglob("*.py"), *package.rglob("*.pyi")]:
        text = path.read_text()
        assert "from baton." not in text and "import baton." not in text, path


@pytest.mark.parametrize(
    ("own", "original"),
    [
        (wire_pb2.Status, status_pb2.Status),
        (wire_pb2.HealthCheckRequest, health_pb2.HealthCheckRequest),
        (wire_pb2.HealthCheckResponse, health_pb2.HealthCheckResponse),
    ],
)
def test_same_on_the_wire(own: type, original: type) -> None:
    assert _fields(own.DESCRIPTOR) == _fields(original.DESCRIPTOR)  # type: ignore[attr-defined]


def _fields(message: Descriptor) -> list[tuple[str, int, bool, str]]:
    # An enum and an int32 are one on the wire.
    return [
        (
            field.name,
            field.number,
            field.is_repeated,
            "varint" if field.type in (field.TYPE_ENUM, field.TYPE_INT32) else str(field.type),
        )
        for field in message.fields
    ]
