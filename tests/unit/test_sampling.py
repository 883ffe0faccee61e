"""The declarations of the sampling fields: what follows from them agrees with the contract."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from baton.services.gateway.openai.schema import UNSUPPORTED, CompletionRequest
from baton.shared.rpc.convert import sampling_from_pb, sampling_to_pb
from baton.shared.sampling import FIELDS, Kind, SamplingField, SamplingParams
from baton.v1 import types_pb2

_CONTRACT = types_pb2.SamplingParams.DESCRIPTOR.fields_by_name
_PROTO_TYPES = {
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_STRING: "string",
}


def test_every_field_of_the_contract_is_declared() -> None:
    assert sorted(_CONTRACT) == sorted(field.name for field in FIELDS)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: str(field.name))
def test_a_field_has_the_type_that_it_is_declared_with(field: SamplingField) -> None:
    here, there = field.kind.value.split(": ")
    in_contract = _CONTRACT[field.name]
    assert there.removeprefix("repeated ") == _proto_type(in_contract)
    assert there.startswith(("repeated", "map")) == in_contract.is_repeated
    hint = get_type_hints(SamplingParams)[field.name]
    assert here == (hint.__name__ if isinstance(hint, type) and "[" not in str(hint) else str(hint))


def _proto_type(field: Any) -> str:
    entry = field.message_type
    if entry is None:
        return _PROTO_TYPES[field.type]
    return f"map<{', '.join(_PROTO_TYPES[each.type] for each in entry.fields)}>"


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: str(field.name))
def test_left_out_is_the_default(field: SamplingField) -> None:
    """Else a field that is not set, and cannot say so, would arrive as something else."""
    assert getattr(sampling_from_pb(types_pb2.SamplingParams()), field.name) == field.default
    if field.limit is not None and field.kind is not Kind.MAYBE_COUNT:
        as_given = dict(field.default) if field.kind is Kind.BIASES else field.default
        assert field.limit(as_given, 100) is None
    assert field.public_name in CompletionRequest.model_fields
    assert field.public_name not in UNSUPPORTED


_VALUES: dict[Kind, st.SearchStrategy[Any]] = {
    Kind.NUMBER: st.floats(width=32, allow_nan=False),
    Kind.COUNT: st.integers(0, 2**32 - 1),
    Kind.MAYBE_COUNT: st.none() | st.integers(0, 2**32 - 1),
    Kind.SEED: st.integers(0, 2**64 - 1),
    Kind.SWITCH: st.booleans(),
    Kind.TOKEN_IDS: st.frozensets(st.integers(0, 2**32 - 1), max_size=5),
    Kind.TEXTS: st.lists(st.text(), max_size=3).map(tuple),
    Kind.BIASES: st.dictionaries(
        st.integers(0, 2**32 - 1), st.floats(width=32, allow_nan=False), max_size=5
    ).map(lambda biases: tuple(sorted(biases.items()))),
}


@given(params=st.fixed_dictionaries({field.name: _VALUES[field.kind] for field in FIELDS}))
def test_workers_get_what_they_apply(params: dict[str, Any]) -> None:
    sent = sampling_to_pb(SamplingParams(**params)).SerializeToString()
    got = sampling_from_pb(types_pb2.SamplingParams.FromString(sent))
    for field in FIELDS:
        expected = params[field.name] if field.is_for_workers else field.default
        assert getattr(got, field.name) == expected
