"""Steps over keys and values in 8 bits whose prompt chunks have them widened first, as on compute
capability 9.0: the same as without, launched and from graphs, whatever there is room for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.kernels import reference_float8
from baton.kernels.float8_jit import is_float8
from baton.kernels.float8_widen import widen_stretches
from baton.shared.engine import (
    device_columns,
    prompt_columns,
    prompt_steps,
    triton_operations,
    widened_keys,
)
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.widened_keys import make_widened_keys
from tests.kernels.float8_pools import empty_pool
from tests.kernels.stand_in_graphs import StandInGraphs
from tests.kernels.test_engine import SMALL, Make, maker, tokens
from tests.kernels.test_prompt_steps import GREEDY, SHAPED, Answer, captured, took
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny

pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]
TWO_LAYERS = {**SMALL, "num_hidden_layers": 2}
"""The last layer's chunks have nobody who asks for what they attend to."""


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory.mktemp("tiny"), TWO_LAYERS)


@pytest.fixture
def widening(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As if there were the kernel for it; tells how many stretches each launch has room for."""
    launches: list[int] = []

    def spy(kv: Any, layer: int, tables: Any, stretches: Any, out: Any, **how: Any) -> Any:
        # What is left of another layer, or another turn, is not taken for this one's.
        out.fill_(float("nan"))
        launches.append(len(stretches))
        return widen_stretches(kv, layer, tables, stretches, out, **how)

    monkeypatch.setattr(triton_operations, "widen_stretches", spy)
    monkeypatch.setattr(widened_keys, "widens", lambda kv, dtype, window: is_float8(kv))
    return launches


def allow(monkeypatch: pytest.MonkeyPatch, num_stretches: int, kv_heads: int, dim: int) -> None:
    """Room for so many stretches in float32."""
    monkeypatch.setattr(widened_keys, "_MOST_BYTES", num_stretches * 128 * 2 * kv_heads * dim * 4)


def fill(runner: ModelRunner) -> None:
    """Whatever was computed before: numbers that are the same for all runners."""
    generator = torch.Generator().manual_seed(7)
    for cache in runner.kv_cache.caches:
        assert isinstance(cache, torch.Tensor)
        codes, exponents = reference_float8.quantised(torch.randn(cache.shape, generator=generator))
        cache.copy_(codes)
        reference_float8.exponents_of(cache).copy_(exponents)


@pytest.mark.parametrize(("room", "launches"), [(5, [2, 3]), (2, [2, 2, 1]), (1, [1, 1])])
def test_launched_steps(
    room: int,
    launches: list[int],
    make: Make,
    device: torch.device,
    widening: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks of a step all at once, one after another, or, where one sees more than there is room
    for, none of them; decode rows beside them."""
    monkeypatch.setattr(
        device_columns, "block_m_for", lambda longest, *_: 128 if longest > 4 else 16
    )
    how: dict[str, Any] = {"kv_cache_dtype": "fp8", "prompt_graphs": False}
    same = make("triton", device, **how)
    same._executor._context.widened = None  # type: ignore[attr-defined]
    allow(monkeypatch, room, 1, TWO_LAYERS["head_dim"])
    runner = make("triton", device, **how)
    del widening[:]
    for each in (same, runner):
        fill(each)
    a, b, c = [*range(20, 30)], [3, 1, 4, 15, 9], [12]
    steps = [
        [BatchRow(tokens(6, 1), 30, [a]), BatchRow(tokens(5, 2), 1, [c])],
        [
            BatchRow(tokens(7, 3), 140, [a]),
            BatchRow(tokens(1, 4), 70, [b]),
            BatchRow(tokens(3, 5), 6, [c]),
        ],
        [BatchRow(tokens(4, 6), 147, [a])],
    ]
    for rows in steps:
        expected, actual = (each.logits(Batch(rows)) for each in (same, runner))
        assert float((actual - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert widening == launches


def test_steps_from_graphs(
    tmp_path: Path,
    device: torch.device,
    widening: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a layer with a window and one without: chunks behind prefixes beside rows that decode; few
    tokens behind many, whose keys are cut; what there is no room for is launched."""
    fields = {**TINY_MODELS["gemma3_text"]["five to one"], "vocab_size": SMALL["vocab_size"]}
    fields |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    make_tiny(tmp_path, "gemma3_text", {**fields, "num_attention_heads": 2})
    how: dict[str, Any] = {"num_blocks": 60, "max_num_seqs": 4, "kv_cache_dtype": "fp8"}
    config = EngineConfig(tmp_path, "cpu", "float32", kernels="torch", **how)
    reference = ModelRunner(config)
    monkeypatch.setattr(prompt_steps, "_ITEMS_ONLY", 16)
    monkeypatch.setattr(prompt_columns, "_FEW_TOKENS", 3)
    monkeypatch.setattr(prompt_columns, "_MANY_KEYS", 15)
    cache = reference.kv_cache.caches[0]
    assert isinstance(cache, torch.Tensor)
    allow(monkeypatch, 3, cache.shape[1], cache.shape[5])
    runner = ModelRunner(replace(config, device=device.type, kernels="triton"))
    if device.type == "cpu":
        captured(runner, StandInGraphs())
    for each in runner.kv_cache.caches:
        assert isinstance(each, torch.Tensor)
        each.view(torch.uint8)[:-1] = 0xFF
    del widening[:]
    a, c = (Answer(reference, number, length, GREEDY) for number, length in ((0, 45), (2, 19)))
    b, d = (Answer(reference, number, length, SHAPED) for number, length in ((1, 7), (3, 20)))
    for answer in (a, b, c, d):
        answer.open(runner)
    steps = [
        [(a, a.chunk(0, 16))],
        [(b, b.chunk(0, 7)), (a, a.chunk(16, 31))],
        [(a, a.chunk(31, 45)), (b, b.next(1))],
        [(b, b.next(2)), (c, c.chunk(0, 16)), (a, a.next(1))],
        [(c, c.chunk(16, 19)), (a, a.next(2)), (b, b.next(3)), (d, d.chunk(0, 11))],
        [(d, d.chunk(11, 20)), (c, c.next(1)), (b, b.next(4)), (a, a.next(3))],
    ]
    for step in steps:
        took(step, runner.launch(Batch([row for _, row in step])))
    counts = runner.num_prompt_steps
    assert (counts.captured, counts.launched) == (6, 0)
    # What was captured on a GPU is not launched again.
    assert set(widening) == ({3} if device.type == "cpu" else set())
    for answer in (a, b, c, d):
        assert answer.drawn == answer.expected[: len(answer.drawn)] and answer.drawn
    many = [BatchRow(tokens(2, number), 0, [[40 + number], [50 + number]]) for number in range(4)]
    runner.forward(Batch(many))
    assert counts.launched == 1, "a stretch each"


def test_room(widening: list[int]) -> None:
    """It grows with the longest row, up to a limit, is the same memory for all groups, and there is
    none for what is kept in 16 bits."""
    pools = [
        empty_pool((3, 2, 5, 2, 16, 64), torch.device("cpu")),
        empty_pool((3, 4, 1, 2, 16, 32), torch.device("cpu")),
        torch.empty(3, 4, 1, 2, 16, 32),
    ]

    def made(longest: int, most_rows: int) -> widened_keys.WidenedKeys:
        keys = make_widened_keys(
            pools, [0, 9, 0], torch.float16, longest=longest, most_rows=most_rows
        )
        assert keys is not None
        return keys

    keys = made(300, 2)
    assert keys.num_stretches == 6
    first, second, none = keys.kv
    assert first is not None and second is not None and none is None
    assert first.shape == (48, 2, 1, 2, 16, 64) and second.shape == (48, 4, 1, 2, 16, 32)
    assert first.data_ptr() == second.data_ptr() and first.dtype == torch.float16
    assert keys.block_tables[5, :3].tolist() == [5, 6, 7] and keys.block_tables[47, 47] == 94
    sizes = [made(longest, 64).num_stretches for longest in (1, 1000, 10**5, 10**6, 10**7)]
    assert sizes == sorted(sizes) and sizes[-1] * 128 * 2 * 128 * 2 == 2**30
    assert make_widened_keys(pools[2:], [0], torch.float16, longest=9, most_rows=1) is None
