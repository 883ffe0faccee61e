"""Decode and prefill of the engine on a GPU, against floors from ceilings measured in the same run.

    python -m benchmarks.gpu.engine [--model DIR] [--points decode,prefill,digest,idle]

Llama-3.1-8B's shape with random weights unless a model is given. Floors: a decode step reads all
weights once, or multiplies by them, whichever takes longer, then reads the KV of its contexts; a
prompt is matrix products at the measured rate plus causal attention at 600 TFLOP/s (what the best
kernels reach). vLLM's figures: 0.26.0 on an H200, default engine process, recorded 2026-11-21.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from baton.loadtest.environment import describe_environment
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.model_files.named import model_dir
from baton.shared.rpc.flags import length_or_auto
from benchmarks.checkout import RESULTS
from benchmarks.gpu.ceilings import Ceilings, measure_ceilings
from benchmarks.in_process import InProcessEngine
from models.dummy_model import given_or_dummy

DECODE = [(1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (256, 1024)]
DECODE += [(1, 8192), (32, 8192)]
PREFILL = [(1, 512), (1, 2048), (1, 8192), (16, 1024)]
VLLM_MS = {
    "decode 1 x 1024": 4.94,
    "decode 8 x 1024": 5.29,
    "decode 32 x 1024": 6.31,
    "decode 64 x 1024": 7.69,
    "decode 128 x 1024": 10.63,
    "decode 256 x 1024": 17.91,
    "decode 1 x 8192": 5.20,
    "decode 32 x 8192": 13.39,
    "prefill 1 x 512": 14.9,
    "prefill 1 x 2048": 51.5,
    "prefill 1 x 8192": 214.4,
    "prefill 16 x 1024": 378.9,
}
_ATTENTION_TFLOP_PER_S = 600.0
_NUM_STEPS = 128
_PREFILLS = 7
_PARTS = ("decode", "prefill", "digest", "idle")


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse_args(argv)
    device = torch.device("cuda")
    ceilings = measure_ceilings(device)
    torch.cuda.empty_cache()
    started_s = time.monotonic()
    with given_or_dummy(args.model, "llama-8b") as model_dir:
        config = EngineConfig(
            model_dir,
            "cuda",
            dtype="bfloat16",
            block_size=args.block_size,
            token_budget=args.token_budget,
            load_format="dummy" if args.model is None else "auto",
            max_model_len=args.max_model_len,
        )
        runner = ModelRunner(config, progress=lambda line: print(line, flush=True))
    start_s = time.monotonic() - started_s
    print(f"engine ready after {start_s:.1f} s: {runner.num_blocks} blocks", flush=True)
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "ceilings": vars(ceilings),
        "token_budget": runner.token_budget,
        "block_size": args.block_size,
        "start_s": start_s,
        "points": {},
    }
    print(
        f"copy {ceilings.copy_tb_per_s:.2f} TB/s, bf16 matmul "
        f"{ceilings.matmul_tflop_per_s:.0f} TFLOP/s\n\n"
        f"{'point':<20} {'ms':>8} {'floor':>8} {'ratio':>6} {'vLLM':>8}   notes"
    )
    points: dict[str, dict[str, float]] = result["points"]
    engine = InProcessEngine(runner)
    if "decode" in args.points:
        for batch, context in DECODE:
            _note(points, *_decode_point(engine, batch, context, ceilings))
    if "prefill" in args.points:
        for batch, num_tokens in PREFILL:
            _note(points, *_prefill_point(engine, batch, num_tokens, ceilings))
    if "digest" in args.points:
        without = InProcessEngine(runner, with_digests=False)
        for batch, num_tokens in PREFILL[2:]:
            _note(points, *_digest_point(engine, without, batch, num_tokens, ceilings))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {args.output}")


def _decode_point(
    engine: InProcessEngine, batch: int, context: int, ceilings: Ceilings
) -> tuple[str, dict[str, float]]:
    gaps = _GapMeter(engine.runner)
    cpu_s = time.thread_time()
    steps = engine.decode(batch, context, _NUM_STEPS)
    cpu_s = time.thread_time() - cpu_s
    return f"decode {batch} x {context}", {
        "ms": statistics.mean(steps) * 1e3,
        "median_ms": statistics.median(steps) * 1e3,
        "p99_ms": sorted(steps)[int(0.99 * len(steps))] * 1e3,
        "floor_ms": decode_floor_s(engine.runner, batch, context + _NUM_STEPS // 2, ceilings) * 1e3,
        "idle_us": gaps.median_us(_NUM_STEPS),
    }


def _prefill_point(
    engine: InProcessEngine, batch: int, num_tokens: int, ceilings: Ceilings
) -> tuple[str, dict[str, float]]:
    engine.prefill(batch, num_tokens)
    times = [engine.prefill(batch, num_tokens) for _ in range(_PREFILLS)]
    floor_s = batch * prefill_floor_s(engine.runner.model_config, num_tokens, ceilings)
    return f"prefill {batch} x {num_tokens}", {
        "ms": statistics.median(times) * 1e3,
        "min_ms": min(times) * 1e3,
        "floor_ms": floor_s * 1e3,
    }


def _digest_point(
    engine: InProcessEngine,
    without: InProcessEngine,
    batch: int,
    num_tokens: int,
    ceilings: Ceilings,
) -> tuple[str, dict[str, float]]:
    """Without digests; what they cost is the median of pairs, since the GPU's clock drifts."""
    pairs = [
        (engine.prefill(batch, num_tokens), without.prefill(batch, num_tokens))
        for _ in range(_PREFILLS + 1)
    ][1:]
    floor_s = batch * prefill_floor_s(engine.runner.model_config, num_tokens, ceilings)
    return f"prefill {batch} x {num_tokens} no digest", {
        "ms": statistics.median(off for _, off in pairs) * 1e3,
        "digest_percent": (statistics.median(on / off for on, off in pairs) - 1) * 100,
        "floor_ms": floor_s * 1e3,
    }


class _GapMeter:
    """Time between the end of a step's work on the GPU and the start of the next one's."""

    def __init__(self, runner: ModelRunner) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        steps: Any = runner._executor
        steps.on_launch = self._events.append
        self._steps = steps

    def median_us(self, num_steps: int) -> float:
        """Of the last `num_steps` steps; ends the measurement."""
        self._steps.on_launch = None
        torch.cuda.synchronize()
        events = self._events[-num_steps:]
        pairs = zip(events[:-1], events[1:], strict=True)
        return float(
            statistics.median(end.elapsed_time(start) * 1e3 for (_, end), (start, _) in pairs)
        )


def decode_floor_s(runner: ModelRunner, batch: int, context: int, ceilings: Ceilings) -> float:
    model = runner.model_config
    num_weights = _num_streamed_weights(model)
    bandwidth = ceilings.copy_tb_per_s * 1e12
    kv_bytes = batch * context * _kv_bytes_per_token(model)
    products_s = 2 * num_weights * batch / (ceilings.matmul_tflop_per_s * 1e12)
    return max(2 * num_weights / bandwidth, products_s) + kv_bytes / bandwidth


def prefill_floor_s(model: ModelConfig, num_tokens: int, ceilings: Ceilings) -> float:
    head = model.vocab_size * model.hidden_size
    flop = 2 * (_num_streamed_weights(model) - head) * num_tokens + 2 * head
    pairs = num_tokens * (num_tokens + 1) / 2
    attention = sum(4 * each.num_heads * each.head_dim * pairs for each in model.layers)
    return flop / (ceilings.matmul_tflop_per_s * 1e12) + attention / (_ATTENTION_TFLOP_PER_S * 1e12)


def _num_streamed_weights(model: ModelConfig) -> int:
    """All but the embedding, of which a step reads a few rows."""
    heads = sum(2 * each.head_dim * (each.num_heads + each.num_kv_heads) for each in model.layers)
    mlp = 3 * model.num_layers * model.intermediate_size
    return model.hidden_size * (heads + mlp + model.vocab_size)


def _kv_bytes_per_token(model: ModelConfig) -> int:
    return sum(2 * 2 * each.num_kv_heads * each.head_dim for each in model.layers)


def _note(points: dict[str, dict[str, float]], name: str, point: dict[str, float]) -> None:
    points[name] = point
    recorded = VLLM_MS.get(name)
    notes = ", ".join(
        f"{key} {value:.2f}" for key, value in point.items() if key not in ("ms", "floor_ms")
    )
    print(
        f"{name:<20} {point['ms']:>8.2f} {point['floor_ms']:>8.2f} "
        f"{point['ms'] / point['floor_ms']:>6.2f} "
        f"{'' if recorded is None else f'{recorded:.2f}':>8}   {notes}",
        flush=True,
    )


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.engine", description=__doc__)
    parser.add_argument(
        "--model", type=model_dir, help="default: Llama-3.1-8B's shape, random weights"
    )
    parser.add_argument("--points", type=lambda text: text.split(","), default=list(_PARTS))
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--max-model-len", type=length_or_auto, default=16_384)
    parser.add_argument("--output", type=Path, default=RESULTS / "engine.json")
    args = parser.parse_args(argv)
    for part in args.points:
        if part not in _PARTS:
            parser.error(f"--points: {part!r} is none of {', '.join(_PARTS)}")
    return args


if __name__ == "__main__":
    main()
