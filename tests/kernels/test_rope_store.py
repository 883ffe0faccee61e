from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from baton.kernels import reference_rope
from baton.kernels.rope_store import rope_and_store

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
    q_norm = torch.randn(head_dim, device=device).to(dtype) if "q" in norms else None
    k_norm = torch.randn(head_dim, device=device).to(dtype) if "k" in norms else None

    shape = (num_blocks + 1, kv_heads, num_layers, 2, block_size, head_dim)
    kv = poisoned(*shape, dtype=dtype)
    out = poisoned(tokens, heads, head_dim, dtype=dtype)
    query = rope_and_store(
        qkv, cos, sin, positions, slots, kv, layer,
        num_heads=heads, q_norm=q_norm, k_norm=k_norm, eps=eps, out=out,
    )  # fmt: skip
    assert query is out

    wide_kv = torch.full(shape, float("nan"), dtype=torch.float64, device=device)
    expected = reference_rope.rope_and_store(
        qkv.double(), cos, sin, positions, slots, wide_kv, layer,
        num_heads=heads, q_norm=q_norm, k_norm=k_norm, eps=eps,
    )  # fmt: skip
    assert_close(query, expected)
    # Exactly the slots asked for are written.
    assert torch.equal(kv.isnan(), wide_kv.isnan())
    if tokens > 1:
        assert_close(kv[~kv.isnan()], wide_kv[~wide_kv.isnan()])


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
