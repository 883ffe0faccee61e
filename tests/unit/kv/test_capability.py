"""Capability: any difference that matters makes another hash."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from baton.shared.kv.capability import Capability

ONE = Capability(
    model_digest="d" * 64,
    dtype="float32",
    cache_dtype="float32",
    block_size=16,
    layout=("Full(2, 24) x 3", "Sliding(2, 24, 64) x 3"),
    determinism="exact",
)
GOLDEN = "4cc723526fdfc3a231503500ffa7706e42bc7ad3d76fcd7290b3ca21e7cad47c"


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": "e" * 64},
        {"dtype": "bfloat16"},
        {"cache_dtype": "bfloat16"},
        {"block_size": 32},
        {"layout": ("Full(2, 24) x 3", "Sliding(2, 24, 65) x 3")},
        {"layout": ("Sliding(2, 24, 64) x 3", "Full(2, 24) x 3")},
        {"layout": ("Full(2, 24) x 3",)},
        {"layout": ("Full(2, 24) x 3", "Sliding(2", "24, 64) x 3")},
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
        "cache_dtype",
        "block_size",
        "layout",
        "determinism",
    }


def test_equal_capabilities_have_equal_hashes() -> None:
    assert dataclasses.replace(ONE).hash() == ONE.hash()


def test_it_never_changes_silently() -> None:
    """Workers of two versions compare these during an upgrade."""
    assert ONE.hash() == GOLDEN
