from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from baton.kernels import reference_rope
from baton.kernels.rope_store import rope_and_store, rope_query

Check = Callable[[torch.Tensor, torch.Tensor], None]
Make = Callable[..., torch.Tensor]


def _angles(positions: int, half: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(positions)[:, None] * torch.rand(half)
    return angle.cos().to(device), angle.sin().to(device)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "block_size", "norms"),
    [
        (1, 4, 2, 128, 16, ""),
        (5, 7, 1, 80, 32, ""),
        (3, 9, 3, 18, 16, "qk"),
        (2, 4, 4, 64, 64, "q"),
        (2, 2, 1, 256, 16, "k"),
        (70, 2, 1, 16, 16, "qk"),
        # Weights of float32, a norm of values, queries scaled by position, the widest heads.
        (3, 5, 2, 48, 16, "qkv wide scale"),
        (3, 3, 1, 512, 16, "qkv"),
        (2, 2, 1, 64, 16, "v scale"),
    ],
)
def test_matches_the_reference(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    norms: str,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Make,
    assert_close: Check,
) -> None:
    num_blocks, num_layers, layer, eps = 6, 3, 1, 1e-5
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    cos, sin = _angles(200, head_dim // 2, device)
    positions = torch.randint(0, 200, (tokens,), dtype=torch.int32, device=device)
    slots = torch.randperm(num_blocks * block_size)[:tokens].to(device)
    slots[tokens // 2] = -1
    of_norms = torch.float32 if "wide" in norms else dtype
    options: dict[str, Any] = {"num_heads": heads, "eps": eps, "value_norm": "v" in norms}
    if "q" in norms:
        options["q_norm"] = torch.randn(head_dim, device=device).to(of_norms)
    if "k" in norms:
        options["k_norm"] = torch.randn(head_dim, device=device).to(of_norms)
    if "scale" in norms:
        options["query_scale"] = torch.rand(200, device=device) + 0.5

    shape = (num_blocks + 1, kv_heads, num_layers, 2, block_size, head_dim)
    kv = poisoned(*shape, dtype=dtype)
    out = poisoned(tokens, heads, head_dim, dtype=dtype)
    query = rope_and_store(qkv, cos, sin, positions, slots, kv, layer, **options, out=out)
    assert query is out

    wide_kv = torch.full(shape, float("nan"), dtype=torch.float64, device=device)
    expected = reference_rope.rope_and_store(
        qkv.double(), cos, sin, positions, slots, wide_kv, layer, **options
    )
    assert_close(query, expected)
    # Exactly the slots asked for are written.
    assert torch.equal(kv.isnan(), wide_kv.isnan())
    if tokens > 1:
        assert_close(kv[~kv.isnan()], wide_kv[~wide_kv.isnan()])


@pytest.mark.parametrize("has_options", [False, True])
def test_queries_alone(
    has_options: bool, device: torch.device, dtype: torch.dtype, poisoned: Make, assert_close: Check
) -> None:
    query = torch.randn(5, 9, 48, device=device).to(dtype)
    cos, sin = _angles(200, 24, device)
    positions = torch.randint(0, 200, (5,), dtype=torch.int32, device=device)
    options: dict[str, Any] = {}
    if has_options:
        options["q_norm"] = torch.randn(48, device=device)
        options["query_scale"] = torch.rand(200, device=device) + 0.5
        options["eps"] = 1e-5
    out = poisoned(5, 9, 48, dtype=dtype)
    assert rope_query(query, cos, sin, positions, **options, out=out) is out
    expected = reference_rope.rope_query(query.double(), cos, sin, positions, **options)
    assert_close(out, expected)


def test_writes_into_wider_rows(device: torch.device, poisoned: Make) -> None:
    qkv = torch.randn(3, 4, 16, device=device)
    cos, sin = _angles(8, 8, device)
    positions = torch.arange(3, dtype=torch.int32, device=device)
    slots = torch.full((3,), -1, dtype=torch.int64, device=device)
    kv = poisoned(2, 1, 1, 2, 16, 16, dtype=torch.float32)
    wide = poisoned(3, 5, 16, dtype=torch.float32)
    rope_and_store(qkv, cos, sin, positions, slots, kv, 0, num_heads=2, out=wide[:, :2])
    expected = rope_and_store(qkv, cos, sin, positions, slots, kv, 0, num_heads=2)
    assert torch.equal(wide[:, :2], expected)
    assert wide[:, 2:].isnan().all()
    assert kv.isnan().all()


def test_no_tokens(device: torch.device, poisoned: Make) -> None:
    empty = torch.empty(0, 4, 16, device=device)
    cos, sin = _angles(8, 8, device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    kv = poisoned(2, 1, 1, 2, 16, 16, dtype=torch.float32)
    out = rope_and_store(empty, cos, sin, none.int(), none, kv, 0, num_heads=2)
    assert out.shape == (0, 2, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dependent_launch_in_a_graph(device: torch.device) -> None:
    qkv = torch.randn(4, 48, 128, device=device, dtype=torch.bfloat16)
    cos, sin = _angles(8, 64, device)
    positions = torch.arange(4, dtype=torch.int32, device=device)
    slots = torch.arange(4, device=device)
    kv = torch.zeros(2, 8, 2, 2, 16, 128, device=device, dtype=torch.bfloat16)
    expected = rope_and_store(qkv, cos, sin, positions, slots, kv, 1, num_heads=32)
    stored = kv.clone()
    out = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    rope_and_store(qkv, cos, sin, positions, slots, kv, 1, num_heads=32, out=out, pdl=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(2):
            rope_and_store(qkv, cos, sin, positions, slots, kv, 1, num_heads=32, out=out, pdl=True)
    out.fill_(float("nan"))
    kv.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(kv, stored)
