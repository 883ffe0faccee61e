"""Prompts of few tokens, few tokens behind many, and chunks beside rows that decode: each by graphs
and, on the same engine, launched kernel by kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_runner import ModelRunner
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.measured_engine import Point, in_turn, without_prompt_graphs
from benchmarks.in_process import GREEDY, InProcessEngine, random_prompts
from models.roofline import behind_floor_s, mixed_floor_s

Figures = dict[str, float]
_MIXED_CONTEXT = 1024
_MIXED_STEPS = 24


def behind_point(
    engine: InProcessEngine, point: Point, ceilings: Ceilings, num_times: int
) -> tuple[str, Figures]:
    """`point`: so many new tokens (its batch) behind so many cached ones."""
    [prefix] = engine.cached_prompts(1, point.num_tokens)
    num_new = point.batch

    times = in_turn(engine.runner, lambda: engine.prefill_behind(prefix, num_new), num_times)
    ms, launched_ms = (statistics.median(each) * 1e3 for each in times)
    figures = {"ms": ms, "launched_ms": launched_ms}
    runner = engine.runner
    floor_s = behind_floor_s(
        runner.model_config, num_new, point.num_tokens, ceilings.rates, runner.kv_cache_dtype
    )
    figures["floor_ms"] = floor_s * 1e3
    return f"{num_new} behind {point.num_tokens}", figures


def mixed_point(
    engine: InProcessEngine, point: Point, ceilings: Ceilings, _: int
) -> tuple[str, Figures]:
    """`point`: so many rows that decode, each behind 1,024 tokens, and a chunk of so many."""
    runner = engine.runner
    figures = dict(zip(("ms", "host_ms", "alone_ms"), _mixed(runner, point), strict=True))
    with without_prompt_graphs(runner):
        launched = _mixed(runner, point)
    figures |= zip(("launched_ms", "launched_host_ms", "launched_alone_ms"), launched, strict=True)
    floor_s = mixed_floor_s(
        runner.model_config,
        point.batch,
        _MIXED_CONTEXT,
        point.num_tokens,
        ceilings.rates,
        runner.kv_cache_dtype,
    )
    figures["floor_ms"] = floor_s * 1e3
    return f"{point.batch} decode + {point.num_tokens}", figures


def _mixed(runner: ModelRunner, point: Point) -> tuple[float, float, float]:
    """Milliseconds of a step among others, of the host for one, and of one by itself. Writes to
    blocks, and slots, whatever they hold."""
    block_size, vocab_size = runner.kv_cache.block_size, runner.model_config.vocab_size
    per_row = -(-(_MIXED_CONTEXT + 4 * _MIXED_STEPS) // block_size)
    handles = [runner.open_row(GREEDY, 0) for _ in range(point.batch)]
    first_free = point.batch * per_row
    num_blocks = -(-point.num_tokens // block_size)

    def tables(blocks: range, slot: int) -> list[list[int]]:
        return [list(blocks) if group.spec.grows else [slot] for group in runner.groups]

    chunk_table = tables(range(first_free, first_free + num_blocks), point.batch)
    [token_ids] = random_prompts(1, point.num_tokens, vocab_size)
    at = _MIXED_CONTEXT

    def batch(*, is_first: bool = False) -> Batch:
        nonlocal at
        rows = [
            BatchRow(
                [7] if is_first else None,
                at,
                tables(range(number * per_row, (number + 1) * per_row), number),
                GREEDY,
                0,
                handle,
            )
            for number, handle in enumerate(handles)
        ]
        at += 1
        return Batch([*rows, BatchRow(token_ids, 0, chunk_table, GREEDY)])

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        started_s = time.perf_counter()
        result = run()
        return (time.perf_counter() - started_s) * 1e3, result

    def sync() -> None:
        if runner.device.type == "cuda":
            torch.cuda.synchronize()

    try:
        runner.forward(batch(is_first=True))
        alone, host = [], []
        for _ in range(_MIXED_STEPS):
            step = batch()
            sync()
            ms, launched = timed(lambda step=step: runner.launch(step))  # type: ignore[misc]
            more_ms, _ = timed(launched.result)
            host.append(ms)
            alone.append(ms + more_ms)
        batches = [batch() for _ in range(_MIXED_STEPS)]

        def run_all() -> None:
            before = None
            for each in batches:
                launched = runner.launch(each)
                if before is not None:
                    before.result()
                before = launched
            assert before is not None
            before.result()

        sync()
        ms, _ = timed(run_all)
        return ms / _MIXED_STEPS, statistics.median(host), statistics.median(alone)
    finally:
        for handle in handles:
            runner.close_row(handle)
