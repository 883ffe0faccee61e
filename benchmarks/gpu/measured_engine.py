"""An engine of some shape, and what is measured of its steps."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.shared.engine.config import KV_CACHE_DTYPES, QUANTIZATIONS, EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.rpc.flags import length_or_auto
from models.dummy_model import given_or_dummy

_FEW_ROWS = 16
_LONGEST = 36_864
"""Tokens that a sequence may have, where nothing else is said and the model has room for them."""


@dataclass(frozen=True, slots=True)
class Point:
    """So many sequences of so many tokens each."""

    batch: int
    num_tokens: int

    @classmethod
    def parse(cls, text: str) -> Point:
        """`32x1024`; raises argparse.ArgumentTypeError."""
        batch, _, num_tokens = text.partition("x")
        try:
            point = cls(int(batch), int(num_tokens))
        except ValueError:
            point = cls(0, 0)
        if point.batch < 1 or point.num_tokens < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxTOKENS, as 32x1024")
        return point

    def __str__(self) -> str:
        return f"{self.batch} x {self.num_tokens}"


def points(text: str) -> list[Point]:
    """Several with commas, or none."""
    return [Point.parse(each) for each in text.split(",") if each]


def list_of(kind: type[int] | type[float]) -> Any:
    """For a flag that takes several numbers with commas."""
    return lambda text: [kind(each) for each in text.split(",") if each]


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for trials")
    add("--block-size", type=int, default=16)
    add("--token-budget", type=int)
    add(
        "--max-model-len",
        type=length_or_auto,
        help=f"default: {_LONGEST}, or what the model has room for",
    )
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--layers", type=int, help="only so many of a shape's, for trials")
    add("--quantization", choices=QUANTIZATIONS, help="make the weights small")
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto")
    add("--num-blocks", type=int, help="of the first pool; default: what memory holds")


def make_runner(
    args: argparse.Namespace,
    shape: str,
    max_num_seqs: int,
    model: Path | None = None,
    **more: Any,
) -> ModelRunner:
    """Of a model directory, else of a shape with random weights. `more`: of EngineConfig."""
    dummy = given_or_dummy(model, shape, num_layers=args.layers, has_tokenizer=False)
    with dummy as directory:
        config = EngineConfig(
            directory,
            args.device,
            dtype="bfloat16" if args.device == "cuda" else "float32",
            block_size=args.block_size,
            num_blocks=args.num_blocks,
            token_budget=args.token_budget,
            max_num_seqs=max_num_seqs,
            load_format="dummy" if model is None else "auto",
            max_model_len=args.max_model_len or _longest(directory),
            gpu_memory_utilization=args.gpu_memory_utilization,
            quantization=args.quantization,
            kv_cache_dtype=args.kv_cache_dtype,
            **more,
        )
        started_s = time.monotonic()

        def progress(line: str) -> None:
            print(f"{time.monotonic() - started_s:7.1f} s  {line}", flush=True)

        return ModelRunner(config, progress=progress)


def _longest(model_dir: Path) -> int:
    config = json.loads((model_dir / "config.json").read_text())
    room: int | None = config.get("text_config", config).get("max_position_embeddings")
    return min(_LONGEST, room or _LONGEST)


@contextmanager
def without_prompt_graphs(runner: ModelRunner) -> Iterator[None]:
    """Steps with prompt chunks are launched kernel by kernel meanwhile."""
    executor: Any = runner._executor
    steps = getattr(executor, "_prompts", None)
    executor._prompts = None
    try:
        yield
    finally:
        executor._prompts = steps


def in_turn(
    runner: ModelRunner, measure: Callable[[], float], num_times: int
) -> tuple[list[float], list[float]]:
    """What is measured with prompt graphs and without, in turn: the GPU's clock drifts."""
    captured, launched = [], []
    for _ in range(num_times + 1):
        captured.append(measure())
        with without_prompt_graphs(runner):
            launched.append(measure())
    return captured[1:], launched[1:]


class GapMeter:
    """Time between the end of a step's work on the GPU and the start of the next one's."""

    def __init__(self, runner: ModelRunner) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        steps: Any = runner._executor
        self._steps = steps
        if runner.device.type == "cuda":
            steps.on_launch = self._events.append

    def median_us(self, num_steps: int) -> float | None:
        """Of the last `num_steps` steps; ends the measurement. None: there is no GPU."""
        if not self._events:
            return None
        self._steps.on_launch = None
        torch.cuda.synchronize()
        events = self._events[-num_steps:]
        pairs = zip(events[:-1], events[1:], strict=True)
        return float(
            statistics.median(end.elapsed_time(start) * 1e3 for (_, end), (start, _) in pairs)
        )


class HitCounter:
    """Counts which experts the steps of a batch read; of a model without experts, nothing."""

    def __init__(self, runner: ModelRunner, batch: int) -> None:
        self._runner = runner
        self._batch = batch
        self._hits: list[Tensor] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Steps meanwhile run without CUDA graphs: those that were captured count nothing."""
        ops: Any = self._runner._ops
        executor: Any = self._runner._executor
        route = ops.route

        def counting_route(logits: Tensor, *args: Any, **options: Any) -> Any:
            routes = route(logits, *args, **options)
            # Padded, as steps of few rows are.
            if self._batch <= len(logits) < max(2 * self._batch, _FEW_ROWS + 1):
                self._hits.append(torch.unique(routes.experts[: self._batch]))
            return routes

        steps = getattr(executor, "_decode", None)
        captured = [(each, each.graphs) for each in steps.buffers.values()] if steps else []
        for each, _ in captured:
            each.graphs = None
        ops.route = counting_route
        try:
            yield
        finally:
            del ops.route
            for each, graphs in captured:
                each.graphs = graphs

    @property
    def mean(self) -> float:
        """Experts of a layer and step."""
        return statistics.mean(each.numel() for each in self._hits)
