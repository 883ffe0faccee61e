"""Which tiles the products of experts are fastest in: `python -m benchmarks.gpu.kernels
--tune-experts`.

Both products of well-known mixtures, in every kind of step (kernels/experts_table.py): of all, or
with `--shape` of those that are named, beside what the table has of the others. A configuration's
time is that of several steps of its kind, each over what the present choice takes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton.kernels.experts_table import TABLE, Tiles, choose, load_table
from baton.kernels.reference_experts import Routes, gated
from benchmarks.gpu.expert_points import MIXTURES, Mixture, Work
from benchmarks.gpu.gpu_timing import time_us

_BF16 = torch.bfloat16
_TIMED = ((1, 8), (32, 64), (128, 512), (2048, 4096))
"""Tokens of the steps that each kind is measured in."""
_CHECKED = (3, 20, 100, 1100)
_KINDS = (0, 1, 3, 2)
"""Steps that decode a few sequences first, then prompts."""
_SMEM_BYTES = 227 * 1024
_MOST_ERROR = 2e-2


@dataclass(frozen=True, slots=True)
class Job:
    mixture: Mixture
    kind: int
    is_up: bool
    tiles: Tiles

    @property
    def name(self) -> str:
        return f"{self.mixture.name} {'up' if self.is_up else 'down'} {self.kind}"


def compile_all(budget_s: float, shapes: Sequence[str] = ()) -> None:
    """Fills the compiler's cache with all that is tried, in parallel: before anything is timed,
    since both need the CPU."""
    deadline = time.monotonic() + budget_s
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(16, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        _compile(pool, _jobs(_named(shapes)), deadline)


def tune(budget_s: float, shapes: Sequence[str] = ()) -> dict[str, Any]:
    """Measures until the time is up, few tokens first → the table file's content. `shapes`: the
    mixtures that are measured; of the others the table keeps what it has. None: all."""
    deadline = time.monotonic() + budget_s
    mixtures = _named(shapes)
    jobs = _jobs(mixtures)
    measured = {(each.rule.num_experts, each.hidden) for each in mixtures}
    entries: list[dict[str, Any]] = [
        each
        for each in load_table(TABLE)
        if (each["experts"], each["k"] if each["is_up"] else each["n"]) not in measured
    ]
    for mixture in mixtures:
        data = Data(mixture)
        for kind in _KINDS:
            for is_up in (True, False):
                own = [
                    job.tiles
                    for job in jobs
                    if (job.mixture, job.kind, job.is_up) == (mixture, kind, is_up)
                ]
                entries += _entries(data, kind, own, deadline, is_up=is_up)
        del data
        torch.cuda.empty_cache()
    return {"device": torch.cuda.get_device_name(), "entries": entries}


def _named(shapes: Sequence[str]) -> list[Mixture]:
    return [each for each in MIXTURES if not shapes or each.name in shapes]


def _jobs(mixtures: Sequence[Mixture]) -> list[Job]:
    return [
        Job(mixture, kind, is_up, tiles)
        for mixture in mixtures
        for kind in _KINDS
        for is_up in (True, False)
        for tiles in candidates(kind, is_up=is_up)
    ]


def candidates(kind: int, *, is_up: bool) -> list[Tiles]:
    """Tiles worth measuring; of gate and up each half of the columns."""
    if kind < 2:
        shapes = [
            (16, 16, 128, 2, 5), (16, 16, 256, 4, 4), (16, 32, 64, 2, 6), (16, 32, 128, 4, 4),
            (16, 32, 128, 2, 5), (16, 32, 256, 4, 3), (16, 64, 64, 4, 5), (16, 64, 128, 4, 4),
            (16, 128, 64, 4, 4),
        ]  # fmt: skip
        groups = [1]
    elif kind == 2:
        shapes = [
            (16, 32, 128, 4, 4), (16, 64, 128, 4, 4), (32, 64, 128, 4, 3), (32, 64, 64, 4, 5),
            (64, 32, 128, 4, 4), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (64, 128, 64, 4, 4),
        ]  # fmt: skip
        groups = [1]
    else:
        shapes = [
            (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4),
            (128, 64, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
        ]  # fmt: skip
        if not is_up:
            shapes += [(64, 256, 64, 4, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4)]
        groups = [1, 8]
    return [
        Tiles(*shape, group, copies)
        for shape in shapes
        for group in groups
        for copies in (False, True)
        if _shared_bytes(*shape, is_up=is_up) <= _SMEM_BYTES
    ]


def _shared_bytes(
    block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int, *, is_up: bool
) -> int:
    return (block_m + block_n * (2 if is_up else 1)) * block_k * 2 * num_stages


class Data:
    """A mixture's weights, and the right results for every kind."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.weights = mixture.weights()
        self._right: dict[tuple[int, bool], tuple[Work, Tensor, Tensor]] = {}
        self._works: dict[int, Work] = {}

    def work(self, num_tokens: int) -> Work:
        if num_tokens not in self._works:
            self._works[num_tokens] = Work.of(self.mixture, self.weights, num_tokens)
        return self._works[num_tokens]

    def call(
        self, num_tokens: int, tiles: Tiles | None, *, is_up: bool
    ) -> tuple[Callable[[int], object], int]:
        """And how many data sets there are."""
        work = self.work(num_tokens)
        return _call(work, tiles, is_up=is_up), len(work.routes)

    def is_right(self, kind: int, tiles: Tiles, *, is_up: bool) -> bool:
        """Whether the result is that of torch in float32."""
        if (kind, is_up) not in self._right:
            work = Work.of(self.mixture, self.weights, _CHECKED[kind])
            x = work.x
            if not is_up:
                x = torch.randn(work.num_pairs, self.mixture.size, dtype=_BF16, device="cuda")
            self._right[kind, is_up] = work, x, _reference(work, x, is_up=is_up)
        work, x, expected = self._right[kind, is_up]
        out = torch.full_like(expected, float("nan"), dtype=_BF16)
        _run(work, 0, out, x, tiles, is_up=is_up)
        error = (out.float() - expected).abs().max() / expected.abs().max()
        return bool(error < _MOST_ERROR)


def _call(work: Work, tiles: Tiles | None, *, is_up: bool) -> Callable[[int], object]:
    width = (work.mixture.size, work.mixture.hidden)
    out = torch.empty(work.num_pairs, width[not is_up], dtype=_BF16, device="cuda")
    x = work.x
    if not is_up:
        x = torch.randn(work.num_pairs, width[0], dtype=_BF16, device="cuda")
    return lambda i: _run(work, i, out, x, tiles, is_up=is_up)


def _run(work: Work, i: int, out: Tensor, x: Tensor, tiles: Tiles | None, *, is_up: bool) -> None:
    from baton.kernels import experts as own

    routes, order, weights = work.routes[i], work.orders[i], work.weights
    if is_up:
        own.multiply_up(out, x, weights, routes, order, work.mixture.activation, tiles=tiles)
    else:
        own.multiply_down(out, x, weights, routes, order, tiles=tiles)


def _reference(work: Work, x: Tensor, *, is_up: bool) -> Tensor:
    """float32, in the pairs' order or where the tokens have them."""
    routes, order = work.routes[0], work.orders[0]
    chosen = routes.experts.view(-1).tolist()
    pairs = list(range(len(chosen))) if order is None else order.pairs.tolist()
    weight, bias = work.weights.down, work.weights.down_bias
    if is_up:
        weight, bias = work.weights.gate_up, work.weights.gate_up_bias
    results = torch.empty(len(pairs), weight.shape[1], device=x.device)
    for place, pair in enumerate(pairs):
        expert = chosen[pair]
        source = x[pair // work.mixture.rule.top_k] if is_up else x[place]
        y = weight[expert].float() @ source.float()
        results[place if is_up else pair] = y if bias is None else y + bias[expert].float()
    return gated(results, work.mixture.activation) if is_up else results


def _entries(
    data: Data, kind: int, own: Sequence[Tiles], deadline: float, *, is_up: bool
) -> list[dict[str, Any]]:
    """The table's entry for a product in a kind of steps; none where time is up."""
    mixture = data.mixture
    num_out, num_in = (mixture.size, mixture.hidden) if is_up else (mixture.hidden, mixture.size)
    now = choose(_TIMED[kind][0], mixture.rule.num_experts, num_out, num_in, is_up=is_up)

    def times(tiles: Tiles) -> list[float]:
        return [
            time_us(*data.call(num_tokens, tiles, is_up=is_up), replays=3)
            for num_tokens in _TIMED[kind]
        ]

    if time.monotonic() > deadline:
        print(f"out of time before {mixture.name} {kind}")
        return []
    before = times(now)
    best, best_ratio, best_times = now, 1.0, before
    tried = []
    for tiles in own:
        if time.monotonic() > deadline:
            break
        try:
            if not data.is_right(kind, tiles, is_up=is_up):
                print(f"WRONG: {mixture.name} {kind} {is_up} {tiles}", flush=True)
                continue
            measured = times(tiles)
        except Exception as error:  # Too much shared memory, too many registers.
            print(f"{mixture.name} {kind} {tiles}: {repr(error)[:120]}")
            continue
        # The geometric mean.
        ratio = math.prod(a / b for a, b in zip(measured, before, strict=True)) ** (1 / len(before))
        tried.append((ratio, measured, tiles))
        if ratio < best_ratio:
            best, best_ratio, best_times = tiles, ratio, measured
    floors = ", ".join(str(num_tokens) for num_tokens in _TIMED[kind])
    print(
        f"{mixture.name:14} {'up' if is_up else 'down':4} {floors:>10}: "
        f"{' '.join(f'{us:8.1f}' for us in before)} µs → "
        f"{' '.join(f'{us:8.1f}' for us in best_times)}  {best_ratio:.2f}  {tuple(best)}",
        flush=True,
    )
    for ratio, measured, tiles in sorted(tried, key=lambda each: each[0])[1:4]:
        print(f"{'':33}{' '.join(f'{us:8.1f}' for us in measured)}  {ratio:.2f}  {tuple(tiles)}")
    return [
        {
            "kind": kind,
            "is_up": is_up,
            "experts": mixture.rule.num_experts,
            "n": num_out,
            "k": num_in,
            "tiles": best._asdict(),
            "us": {
                str(num_tokens): round(us, 1)
                for num_tokens, us in zip(_TIMED[kind], best_times, strict=True)
            },
            "us_before": [round(us, 1) for us in before],
        }
    ]


def _compile(pool: ProcessPoolExecutor, jobs: Sequence[Job], until_s: float) -> None:
    """Fills the compiler's cache in parallel, where the programs that are timed are found."""
    started_s = time.monotonic()
    futures = [pool.submit(_compile_one, job) for job in jobs]
    try:
        for _ in as_completed(futures, timeout=max(1.0, until_s - started_s)):
            pass
    except TimeoutError:
        for future in futures:
            future.cancel()
    num_done = sum(future.done() and not future.cancelled() for future in futures)
    took_s = time.monotonic() - started_s
    print(f"compiled {num_done} of {len(futures)} programs in {took_s:.0f} s", flush=True)


def _compile_one(job: Job) -> None:
    """In a process of its own: runs the program once. All pairs are of the first expert, so that
    the others need no memory."""
    from baton.kernels.expert_order import order_of
    from baton.kernels.experts import ExpertWeights

    mixture, rule = job.mixture, job.mixture.rule
    try:

        def of_one(*shape: int) -> Tensor:
            one = torch.empty(shape, dtype=_BF16, device="cuda")
            return one.expand(rule.num_experts, *shape)

        weights = ExpertWeights(
            of_one(2 * mixture.size, mixture.hidden),
            of_one(mixture.hidden, mixture.size),
            of_one(2 * mixture.size) if mixture.has_bias else None,
            of_one(mixture.hidden) if mixture.has_bias else None,
        )
        shape = (_CHECKED[job.kind], rule.top_k)
        routes = Routes(
            torch.zeros(shape, dtype=torch.int32, device="cuda"),
            torch.ones(shape, device="cuda"),
        )
        x = torch.empty(shape[0], mixture.hidden, dtype=_BF16, device="cuda")
        order = order_of(routes, rule.num_experts)
        work = Work(mixture, weights, shape[0], x, [routes], [order])
        _call(work, job.tiles, is_up=job.is_up)(0)
        torch.cuda.synchronize()
    except Exception:  # It is reported when it is timed.
        pass
