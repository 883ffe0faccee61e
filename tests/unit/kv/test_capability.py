"""Capability: any difference that matters makes another hash."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from baton.shared.kv.capability import Capability

ONE = Capability(
    model_digest="d" * 64,
    dtype="float32",
    block_size=16,
    layout="block,kv_head,layer,kv,token,dim",
    cache_groups=("Full(2, 24) x 3",),
    determinism="exact",
)
GOLDEN = "e6f585ac0c04fa08dc3703efd281963226583e626c41ded65f118b6a3cc349cc"


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": "e" * 64},
        {"dtype": "bfloat16"},
        {"block_size": 32},
        {"layout": "block,layer,kv_head,kv,token,dim"},
        {"cache_groups": ("Full(2, 24) x 4",)},
        {"cache_groups": ("Full(2, 24) x 3", "Full(2, 24) x 3")},
        {"cache_groups": ("Full(2", "24) x 3")},
        {"determinism": "consistent"},
    ],
)
def test_every_field_counts(change: dict[str, Any]) -> None:
    other = dataclasses.replace(ONE, **change)
    assert other.hash() != ONE.hash()


def test_no_field_is_forgotten() -> None:
    """A new field must be in the table above; the hash covers whatever there is."""
    assert {field.name for field in dataclasses.fields(Capability)} == {
        "model_digest",
        "dtype",
        "block_size",
        "layout",
        "cache_groups",
        "determinism",
    }


def test_equal_capabilities_have_equal_hashes() -> None:
    assert dataclasses.replace(ONE).hash() == ONE.hash()


def test_it_never_changes_silently() -> None:
    """Workers of two versions compare these during an upgrade."""
    assert ONE.hash() == GOLDEN
