"""Decode and prefill of the engine on a GPU, against floors from ceilings measured in the same run.

    python -m benchmarks.gpu.engine [--shape NAME[,NAME ...] | --model DIR]
        [--decode 1x1024,32x1024] [--prefill 1x8192] [--digest 1x8192]
        [--behind 64x8192] [--mixed 32x512]

Well-known shapes with random weights, each in a process of its own. Floors (models/roofline.py): a
decode step reads all weights once, of a mixture's experts those that were counted, or multiplies by
them, whichever takes longer, then reads keys and values within the layers' windows; a prompt is
matrix products at the measured rate plus causal attention at 600 TFLOP/s (what the best kernels
reach). Of prompts it also prints how long they take without graphs (`launched_ms`), on the same
engine. `python -m benchmarks.gpu.tables FILE` renders what was written.

Kernels are compiled on the first start on a machine. `--compile-only --layers 6 --num-blocks 1100`
of several shapes at the same time, with the `--max-num-seqs` of what follows, makes that short.

vLLM's figures: 0.26.0 on an H200, default engine process, recorded 2026-11-21.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from baton.loadtest.environment import describe_environment
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.model_files.named import model_dir
from benchmarks.checkout import ROOT
from benchmarks.gpu.ceilings import Ceilings, measure_ceilings
from benchmarks.gpu.measured_engine import (
    GapMeter,
    HitCounter,
    Point,
    add_engine_flags,
    in_turn,
    make_runner,
    points,
)
from benchmarks.gpu.prompt_points import behind_point, mixed_point
from benchmarks.gpu.results import result_path, results_name
from benchmarks.gpu.step_profile import profile_decode, profile_prompts
from benchmarks.in_process import InProcessEngine
from models.dummy_model import SHAPES
from models.roofline import decode_floor_s, prefill_floor_s

_DECODE = "1x1024,8x1024,32x1024,64x1024,128x1024,256x1024,1x8192,32x8192"
_PREFILL = "1x64,1x128,1x256,1x512,1x2048,1x8192,16x1024"
_BEHIND = "64x8192,64x32768"
_MIXED = "32x512"
_DIGEST = "1x8192,16x1024"
_VLLM_ON = ("llama-8b", "NVIDIA H200")
_VLLM_MS = {
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
_FEWEST_SEQS = 16
_COUNTED_STEPS = 4
_PREFILLS = 7

Figures = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    output = result_path(args.output, results_name("engine"))
    result: dict[str, Any] = {"environment": describe_environment(), "runs": {}}
    failed = []
    for shape in args.shape:
        run = _measure_apart(args, shape) if len(args.shape) > 1 else _measure(args, shape)
        if run is None:
            failed.append(shape)
            continue
        result["runs"][shape] = run
        # After each: who runs out of time has the others.
        output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {output}" if result["runs"] else "\nnothing was measured")
    for shape in failed:
        print(f"{shape}: failed")
    return 1 if failed else 0


def _measure_apart(args: argparse.Namespace, shape: str) -> dict[str, Any] | None:
    """In a process of its own, so that all memory is given back, and what fails there fails alone;
    None: it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "run.json")
        own = [sys.executable, "-m", "benchmarks.gpu.engine", *args.argv]
        try:
            # What comes last counts.
            subprocess.run(
                [*own, "--shape", shape, "--output", str(output)],
                cwd=ROOT,
                timeout=args.shape_timeout,
            )
        except subprocess.TimeoutExpired:
            print(f"{shape}: not done after {args.shape_timeout:g} s", flush=True)
        if not output.exists():
            return None
        run: dict[str, Any] = json.loads(output.read_text())["runs"][shape]
        return run


def _measure(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    device = torch.device(args.device)
    ceilings = measure_ceilings(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    most = [point.batch for point in args.decode] + [1 + point.batch for point in args.mixed]
    largest = max(most, default=_FEWEST_SEQS)
    max_num_seqs = args.max_num_seqs or max(_FEWEST_SEQS, largest)
    started_s = time.monotonic()
    runner = make_runner(args, shape, max_num_seqs, args.model)
    start_s = time.monotonic() - started_s
    name = shape if args.model is None else str(args.model)
    print(
        f"\n{name}: ready after {start_s:.1f} s, blocks {runner.num_blocks}, token budget "
        f"{runner.token_budget}; copy {ceilings.copy_tb_per_s:.2f} TB/s, bf16 matmul "
        f"{ceilings.matmul_tflop_per_s:.0f} TFLOP/s\n\n"
        f"{'point':<26} {'ms':>8} {'floor':>8} {'share':>6} {'vLLM':>8}   notes",
        flush=True,
    )
    figures: dict[str, Figures] = {}
    run: dict[str, Any] = {
        "ceilings": vars(ceilings),
        "kernels": runner.kernels,
        "token_budget": runner.token_budget,
        "block_size": args.block_size,
        "quantization": runner.quantization,
        "kv_cache_dtype": runner.kv_cache_dtype,
        "num_layers": runner.model_config.num_layers,
        "start_s": start_s,
        "points": figures,
    }
    vllm_ms = _VLLM_MS if (shape, _gpu_name(device)) == _VLLM_ON else {}
    engine = InProcessEngine(runner, max_num_seqs=max_num_seqs)
    if args.compile_only:
        return run
    # As a worker does: looking through all that is there takes as long as many steps.
    gc.collect()
    gc.freeze()
    plans = [(_decode_point, point) for point in args.decode]
    plans += [(_prefill_point, point) for point in args.prefill]
    plans += [(_behind_point, point) for point in args.behind]
    plans += [(_digest_point, point) for point in args.digest]
    # Last: it writes to blocks that are the prefix cache's.
    plans += [(_mixed_point, point) for point in args.mixed]
    for measure, point in plans:
        try:
            label, own = measure(engine, point, ceilings, args)
        except (RuntimeError, ValueError) as error:  # One must not cost the others.
            print(f"{measure.__name__[1:]} {point}: {error}", flush=True)
            continue
        figures[label] = own
        _print(label, own, vllm_ms.get(label))
    if args.profile is not None:
        tables = [profile_decode(engine, point) for point in args.decode]
        tables += [profile_prompts(engine)] if args.prefill else []
        args.profile.write_text("\n".join(tables))
    return run


def _decode_point(
    engine: InProcessEngine, point: Point, ceilings: Ceilings, args: argparse.Namespace
) -> tuple[str, Figures]:
    runner, batch = engine.runner, point.batch
    prompts = engine.cached_prompts(batch, point.num_tokens)
    gaps = GapMeter(runner)
    steps = engine.decode_cached(prompts, args.steps)
    idle_us = gaps.median_us(args.steps)
    figures: Figures = {
        "ms": statistics.mean(steps) * 1e3,
        "median_ms": statistics.median(steps) * 1e3,
        "p99_ms": sorted(steps)[int(0.99 * len(steps))] * 1e3,
        "slowest_step": steps.index(max(steps)),
    }
    if idle_us is not None:
        figures["idle_us"] = idle_us
    hits = None
    if runner.model_config.mixture is not None:
        counter = HitCounter(runner, batch)
        with counter.counting():
            engine.decode_cached(prompts, _COUNTED_STEPS)
        hits = figures["experts_hit"] = counter.mean
    # Contexts grow while it is measured.
    context = point.num_tokens + args.steps // 2
    floor_s = decode_floor_s(
        runner.model_config,
        batch,
        context,
        ceilings.rates,
        experts_hit=hits,
        quantization=runner.quantization,
        kv_cache_dtype=runner.kv_cache_dtype,
    )
    figures["floor_ms"] = floor_s * 1e3
    return f"decode {point}", figures


def _prefill_point(
    engine: InProcessEngine, point: Point, ceilings: Ceilings, args: argparse.Namespace
) -> tuple[str, Figures]:
    times, launched = in_turn(
        engine.runner, lambda: engine.prefill(point.batch, point.num_tokens), args.prefills
    )
    return f"prefill {point}", {
        "ms": statistics.median(times) * 1e3,
        "min_ms": min(times) * 1e3,
        "launched_ms": statistics.median(launched) * 1e3,
        "floor_ms": _prefill_floor_ms(engine.runner, point, ceilings),
    }


def _behind_point(
    engine: InProcessEngine, point: Point, ceilings: Ceilings, args: argparse.Namespace
) -> tuple[str, Figures]:
    return behind_point(engine, point, ceilings, args.prefills)


def _mixed_point(
    engine: InProcessEngine, point: Point, ceilings: Ceilings, args: argparse.Namespace
) -> tuple[str, Figures]:
    return mixed_point(engine, point, ceilings, args.prefills)


def _digest_point(
    engine: InProcessEngine, point: Point, ceilings: Ceilings, args: argparse.Namespace
) -> tuple[str, Figures]:
    """Without digests; what they cost is the median of pairs, since the GPU's clock drifts."""
    without = InProcessEngine(engine.runner, max_num_seqs=engine.max_num_seqs, with_digests=False)
    pairs = [
        tuple(each.prefill(point.batch, point.num_tokens) for each in (engine, without))
        for _ in range(args.prefills + 1)
    ][1:]
    return f"prefill {point} no digest", {
        "ms": statistics.median(off for _, off in pairs) * 1e3,
        "digest_percent": (statistics.median(on / off for on, off in pairs) - 1) * 100,
        "floor_ms": _prefill_floor_ms(engine.runner, point, ceilings),
    }


def _prefill_floor_ms(runner: ModelRunner, point: Point, ceilings: Ceilings) -> float:
    one_s = prefill_floor_s(
        runner.model_config, point.num_tokens, ceilings.rates, quantization=runner.quantization
    )
    return point.batch * one_s * 1e3


def _print(label: str, figures: Figures, vllm_ms: float | None) -> None:
    notes = ", ".join(
        f"{key} {value:.2f}" for key, value in figures.items() if key not in ("ms", "floor_ms")
    )
    print(
        f"{label:<26} {figures['ms']:>8.2f} {figures['floor_ms']:>8.2f} "
        f"{figures['floor_ms'] / figures['ms']:>6.1%} "
        f"{'' if vllm_ms is None else f'{vllm_ms:.2f}':>8}   {notes}",
        flush=True,
    )


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.engine", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--shape",
        type=lambda text: text.split(","),
        default=["llama-8b"],
        metavar="NAME,...",
        help=f"of {', '.join(SHAPES)}; default: llama-8b",
    )
    add("--model", type=model_dir, help="a model directory in place of a shape")
    add("--decode", type=points, default=points(_DECODE), metavar="BATCHxTOKENS,...")
    add("--prefill", type=points, default=points(_PREFILL), metavar="BATCHxTOKENS,...")
    add("--behind", type=points, default=points(_BEHIND), metavar="NEWxCACHED,...")
    add("--mixed", type=points, default=points(_MIXED), metavar="ROWSxTOKENS,...")
    add("--digest", type=points, default=points(_DIGEST), metavar="BATCHxTOKENS,...")
    add("--steps", type=int, default=128, help="of each decode point")
    add("--prefills", type=int, default=_PREFILLS, help="of each other point")
    add("--max-num-seqs", type=int, help="default: the largest batch that decodes")
    add("--compile-only", action="store_true", help="start, and measure nothing")
    add("--shape-timeout", type=float, default=600.0, help="seconds for each of several shapes")
    add("--profile", type=Path, help="also write there where steps' time goes, by kernel")
    add("--output", type=Path, help="a file, or a directory for it")
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    for shape in args.shape:
        if shape not in SHAPES:
            parser.error(f"--shape: {shape!r} is none of {', '.join(SHAPES)}")
    if args.model is not None:
        args.shape = args.shape[:1]
    return args


if __name__ == "__main__":
    sys.exit(main())
