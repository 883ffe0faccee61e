"""What a decode step costs when all rows ask for something, on a GPU; and what it takes of memory.

    python -m benchmarks.gpu.features [--shape llama-8b] [--batches 1,32,128] [--mask-ms 0,1,4]

The engine loop, as in benchmarks.gpu.engine, with rows that ask for nothing, for penalties, for the
logprobs of 20 tokens, or that are constrained: then a stand-in for grammars takes so many ms of the
host for all masks of a step together, of all rows or of one beside others without. What of that is
hidden is how much shorter a step is than one without masks and the masks' own time, one after the
other. Idle is the GPU's time between steps; a step that waits for its masks ends with their draw.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baton.loadtest.environment import describe_environment
from baton.shared.sampling import SamplingParams
from baton.shared.token_masks import TokenMasks, num_mask_words
from benchmarks.gpu.measured_engine import GapMeter, add_engine_flags, make_runner
from benchmarks.gpu.results import result_path, results_name
from benchmarks.in_process import GREEDY, InProcessEngine
from models.dummy_model import SHAPES

_FEWEST_SEQS = 16
_PENALTIES = SamplingParams(
    temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.1
)
_LOGPROBS = SamplingParams(temperature=0.0, logprobs=20)


class StandInMatcher:
    """In place of an `AnswerMatcher`: every other token may follow, and to find out takes time."""

    def __init__(self, vocab_size: int, mask_s: float) -> None:
        self.num_taken = 0
        self._mask = np.full((1, num_mask_words(vocab_size)), 0x55555555, np.uint32)
        self._mask_s = mask_s

    def take(self, token_ids: Sequence[int]) -> None:
        self.num_taken += len(token_ids)

    def forced(self, most: int) -> tuple[int, ...]:
        return ()

    def masks(self, draft_ids: Sequence[int] = ()) -> TokenMasks:
        # The host computes: to sleep would leave it to others.
        until_s = time.perf_counter() + self._mask_s
        while time.perf_counter() < until_s:
            pass
        return self._mask.repeat(1 + len(draft_ids), 0)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    output = result_path(args.output, results_name("features"))
    started_s = time.monotonic()
    runner = make_runner(args, args.shape, max(_FEWEST_SEQS, *args.batches))
    engine = InProcessEngine(runner, max_num_seqs=max(_FEWEST_SEQS, *args.batches))
    print(f"{args.shape}: ready after {time.monotonic() - started_s:.1f} s\n")
    resident = _resident_mib(runner._executor)
    for name, mib in resident.items():
        print(f"{mib:8.1f} MiB  {name}")
    print(f"\n{'batch':>5} {'rows ask for':<24} {'ms':>8} {'more':>8} {'hidden':>7} {'idle us':>8}"
          f" {'peak MiB':>9}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    result = {
        "environment": describe_environment(),
        "shape": args.shape,
        "context": args.context,
        "resident_mib": resident,
        "points": rows,
    }
    for batch in args.batches:
        prompts = engine.cached_prompts(batch, args.context)
        plain_ms = _measure(engine, prompts, args.steps, GREEDY, None, 0)["ms"]
        for name, how, mask_ms, num_masked in _features(args.mask_ms, batch):
            row = _measure(engine, prompts, args.steps, how, mask_ms, num_masked)
            row = {"batch": batch, "rows ask for": name, **row, "more_ms": row["ms"] - plain_ms}
            if mask_ms:
                row["mask_ms"] = mask_ms
                row["hidden"] = 1 - row["more_ms"] / mask_ms
            rows.append(row)
            _print(row)
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {output}")
    return 0


def _features(
    mask_ms: Sequence[float], batch: int
) -> list[tuple[str, SamplingParams, float | None, int]]:
    """(name, parameters, ms of all masks of a step, number of rows with one; None: no masks). The
    first one again says how far the same is apart."""
    features: list[tuple[str, SamplingParams, float | None, int]] = [
        ("nothing", GREEDY, None, 0),
        ("penalties", _PENALTIES, None, 0),
        ("logprobs of 20", _LOGPROBS, None, 0),
        *((f"masks of {each:g} ms", GREEDY, each, batch) for each in mask_ms),
    ]
    if mask_ms and batch > 1:
        features.append((f"one a mask of {max(mask_ms):g} ms", GREEDY, max(mask_ms), 1))
    return features


def _measure(
    engine: InProcessEngine,
    prompts: Sequence[Sequence[int]],
    num_steps: int,
    how: SamplingParams,
    mask_ms: float | None,
    num_masked: int,
) -> dict[str, Any]:
    runner = engine.runner
    more: Callable[[], dict[str, Any]] = dict
    if mask_ms is not None:
        vocab_size, each_s = runner.model_config.vocab_size, mask_ms / num_masked / 1e3
        numbers = count()

        def more() -> dict[str, Any]:
            is_masked = next(numbers) % len(prompts) < num_masked
            return {"matcher": StandInMatcher(vocab_size, each_s)} if is_masked else {}

    is_cuda = runner.device.type == "cuda"
    before = 0
    if is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    # What is done for the first time takes longer.
    engine.decode_cached(prompts, 2, how, more)
    gaps = GapMeter(runner)
    steps = engine.decode_cached(prompts, num_steps, how, more)
    row: dict[str, Any] = {
        "ms": statistics.mean(steps) * 1e3,
        "median_ms": statistics.median(steps) * 1e3,
        "p99_ms": sorted(steps)[int(0.99 * len(steps))] * 1e3,
    }
    idle_us = gaps.median_us(num_steps)
    if idle_us is not None:
        row["idle_us"] = idle_us
    if is_cuda:
        # Of steps with chunks of the prompts, too.
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def _resident_mib(executor: Any) -> dict[str, float]:
    """What is there for features whether rows ask for them or not."""
    if not hasattr(executor, "_context"):
        return {}
    context = executor._context
    shaping, masks = context.state.shaping, context.draw.masks
    parts = {
        "marks of each slot's tokens, for penalties and bans": [shaping.counting.marks],
        "biases and bans of each slot": [shaping.bias_tokens, shaping.biases, shaping.bans],
        "logits that change, in float32": [context.draw._changed],
        "masks": [masks._rows, masks._masks],
    }
    return {
        name: sum(each.nbytes for each in tensors if each is not None) / 2**20
        for name, tensors in parts.items()
    }


def _print(row: dict[str, Any]) -> None:
    hidden = f"{row['hidden']:.0%}" if "hidden" in row else ""
    idle = f"{row['idle_us']:.1f}" if "idle_us" in row else ""
    peak = f"{row['peak_mib']:.1f}" if "peak_mib" in row else ""
    print(
        f"{row['batch']:>5} {row['rows ask for']:<24} {row['ms']:>8.3f} {row['more_ms']:>8.3f} "
        f"{hidden:>7} {idle:>8} {peak:>9}",
        flush=True,
    )


def _numbers(text: str) -> list[float]:
    return [float(each) for each in text.split(",") if each]


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.features", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-8b")
    add(
        "--batches",
        type=lambda text: [int(each) for each in text.split(",")],
        default=[1, 32, 128],
    )
    add("--context", type=int, default=1024)
    add("--steps", type=int, default=64)
    add("--mask-ms", type=_numbers, default=[0.0, 1.0, 4.0], help="of all masks of a step")
    add("--output", type=Path, help="a file, or a directory for it")
    add_engine_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
