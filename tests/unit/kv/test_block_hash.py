"""The content address of a block: equal only for equal contexts, and the same for ever."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from baton.shared.kv.block_hash import (
    PREFIX_STRIDE_TOKENS,
    KnownHashes,
    block_hash,
    boundary_hashes,
    chain_hashes,
    is_boundary,
    root_hash,
)

BLOCK_SIZE = 4
GOLDEN_ROOT = "dca004d2d5241da9ddd9e100f81998b5358857f7bb247e37c39a80c7c85154c0"
GOLDEN_BLOCK = "435bb4ef22411653e42de9b6d04c84153ac8a7784813119ba783f457943aada8"


class Context(NamedTuple):
    """All that the bytes of a block depend on."""

    capability_hash: str
    adapter: str
    salt: bytes
    tokens: tuple[int, ...]

    def hashes(self) -> list[bytes]:
        root = root_hash(self.capability_hash, adapter=self.adapter, salt=self.salt)
        return chain_hashes(root, self.tokens, BLOCK_SIZE)


# Few characters, so that fields that were merely joined would collide.
text = st.text("a\0b", max_size=4)
contexts = st.builds(
    Context,
    capability_hash=text,
    adapter=text,
    salt=text.map(str.encode),
    tokens=st.lists(st.integers(0, 2), min_size=BLOCK_SIZE, max_size=4 * BLOCK_SIZE).map(
        lambda tokens: tuple(tokens[: len(tokens) // BLOCK_SIZE * BLOCK_SIZE])
    ),
)


@given(one=contexts, other=contexts)
def test_unequal_contexts_share_no_hash(one: Context, other: Context) -> None:
    same_field = one[:3] == other[:3]
    for i, a in enumerate(one.hashes()):
        for j, b in enumerate(other.hashes()):
            same = one.tokens[: (i + 1) * BLOCK_SIZE] == other.tokens[: (j + 1) * BLOCK_SIZE]
            assert (a == b) == (same_field and same)


def recorded_pre_images(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    images: list[bytes] = []

    def record(data: bytes) -> Any:
        images.append(data)
        return hashlib.sha256(data)

    fake = SimpleNamespace(sha256=record)
    monkeypatch.setattr("baton.shared.kv.block_hash.hashlib", fake)
    return images


fields = st.tuples(text, text, text.map(str.encode))
steps = st.tuples(st.binary(max_size=9), st.lists(st.integers(0, 2**32 - 1), max_size=3))


@given(one=fields, other=fields, step=steps, other_step=steps)
def test_unequal_inputs_share_no_pre_image(
    one: tuple[str, str, bytes],
    other: tuple[str, str, bytes],
    step: tuple[bytes, list[int]],
    other_step: tuple[bytes, list[int]],
) -> None:
    """Whatever the lengths of the fields: not even parents that no hash function would give."""
    assume(one != other and step != other_step)
    with pytest.MonkeyPatch.context() as monkeypatch:
        images = recorded_pre_images(monkeypatch)
        for capability_hash, adapter, salt in (one, other):
            root_hash(capability_hash, adapter=adapter, salt=salt)
        for parent, tokens in (step, other_step):
            block_hash(parent, tokens)
    assert len(set(images)) == 4


def test_it_never_changes_silently() -> None:
    """Workers of different versions, and the directory, compare these: a new schema gets a new
    tag in the root, and so new golden values."""
    root = root_hash("c0ffee", adapter="lora", salt=b"tenant")
    assert root.hex() == GOLDEN_ROOT
    assert block_hash(root, range(16)).hex() == GOLDEN_BLOCK


def test_hashes_are_chained_and_extended_in_parts_alike() -> None:
    root, tokens = root_hash("x"), list(range(19))
    whole = chain_hashes(root, tokens, BLOCK_SIZE)
    assert len(whole) == 4, "only full blocks have a hash"
    assert whole[2] == block_hash(whole[1], tokens[8:12])
    for num_blocks in range(1, 5):
        start = num_blocks * BLOCK_SIZE
        rest = chain_hashes(whole[num_blocks - 1], tokens[start:], BLOCK_SIZE)
        assert rest == whole[num_blocks:]


@pytest.mark.parametrize("block_size", [1, 16, 256, 512])
def test_the_listed_hashes_are_those_at_boundaries(block_size: int) -> None:
    root, tokens = root_hash("x"), list(range(1100))
    hashes = chain_hashes(root, tokens, block_size)
    listed = [each for index, each in enumerate(hashes) if is_boundary(index, block_size)]
    assert boundary_hashes(root, tokens, block_size) == listed
    assert len(listed) == 1100 // max(PREFIX_STRIDE_TOKENS, block_size)


@given(
    prompts=st.lists(st.lists(st.integers(0, 2), max_size=200), max_size=8),
    most_runs=st.integers(0, 3),
)
def test_hashes_that_are_known_are_those_that_are_made(
    prompts: list[list[int]], most_runs: int
) -> None:
    root, known = root_hash("x"), KnownHashes(most_runs)
    for prompt in prompts:
        for start in (0, BLOCK_SIZE):
            made = chain_hashes(root, prompt[start:], BLOCK_SIZE)
            assert known.chain(root, prompt[start:], BLOCK_SIZE) == made
            assert known.chain(root, tuple(prompt[start:]), 1) == chain_hashes(
                root, prompt[start:], 1
            )
    assert len(known._runs) <= most_runs


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_token_ids_that_would_be_cut_are_refused(token_id: int) -> None:
    with pytest.raises(OverflowError):
        block_hash(b"", [token_id])


@pytest.mark.parametrize("block_size", [1, 16, 128, 256, 512])
def test_boundaries_lie_every_stride(block_size: int) -> None:
    ends = [
        (i + 1) * block_size for i in range(64 * 16 // block_size) if is_boundary(i, block_size)
    ]
    assert ends == list(range(max(PREFIX_STRIDE_TOKENS, block_size), 1025, max(256, block_size)))
