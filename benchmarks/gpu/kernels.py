"""Each kernel against its floor and against the best library call, on one GPU.

    python -m benchmarks.gpu.kernels [--only NAME ...] [--output FILE_OR_DIRECTORY]
    python -m benchmarks.gpu.kernels --tune | --tune-experts [--shape NAME,...]
        [--budget SECONDS] [--output FILE_OR_DIRECTORY]

A floor is the bytes that must move over the bandwidth of a large copy, or the operations over the
rate of a large matrix product, whichever takes longer; both are measured in the same run. Under
1 µs a floor says nothing about a kernel, so no ratio is given. Times are of calls in a replayed
CUDA graph, over data sets too large for the cache.

`--tune` writes linear_table.json, `--tune-experts` experts_table.json; both belong into kernels/.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from baton.loadtest.environment import describe_environment
from benchmarks.gpu import experts_tune, linear_tune
from benchmarks.gpu.ceilings import Ceilings, measure_ceilings
from benchmarks.gpu.gpu_timing import Point, time_us
from benchmarks.gpu.kernel_points import POINTS
from benchmarks.gpu.results import result_path, results_name

_MIN_FLOOR_US = 1.0


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu.kernels needs a GPU")
    if args.tune:
        table = {"environment": describe_environment(), **linear_tune.tune(args.budget, args.shape)}
        _write(result_path(args.output, "linear_table.json"), table)
    elif args.tune_experts:
        _tune_experts(args)
    else:
        _run(args.only, result_path(args.output, results_name("kernels")))


def _tune_experts(args: argparse.Namespace) -> None:
    if args.compile != "skip":
        experts_tune.compile_all(args.budget / 2, args.shape)
    if args.compile != "only":
        table = {
            "environment": describe_environment(),
            **experts_tune.tune(args.budget, args.shape),
        }
        _write(result_path(args.output, "experts_table.json"), table)


def _write(output: Path, result: dict[str, Any]) -> None:
    """What took minutes to measure is printed if it cannot be written."""
    text = json.dumps(result, indent=1) + "\n"
    try:
        output.write_text(text)
    except OSError as error:
        print(f"\n{text}\nnot written: {error}")
    else:
        print(f"written to {output}", flush=True)


def _run(only: Sequence[str], output: Path) -> None:
    started_s = time.monotonic()
    environment = describe_environment()
    ceilings = measure_ceilings(torch.device("cuda"))
    torch.cuda.empty_cache()
    print(
        f"{environment.get('gpu')}: copy {ceilings.copy_tb_per_s:.2f} TB/s, "
        f"matrix product {ceilings.matmul_tflop_per_s:.0f} TFLOP/s\n"
    )
    print(f"{'kernel':18}{'shape':30}{'µs':>9}{'floor':>9}{'ratio':>7}{'library':>9}{'ratio':>7}")
    results: list[dict[str, Any]] = []
    result = {"environment": environment, "ceilings": vars(ceilings), "results": results}
    for name, points in POINTS.items():
        if only and name not in only:
            continue
        try:
            for point in points():
                results.append({"kernel": name, **_measure(point, ceilings)})
                _print(results[-1])
        except Exception as error:  # One kernel's failure must not cost the others' results.
            print(f"{name:18}skipped: {repr(error)[:300]}", flush=True)
            results.append({"kernel": name, "error": repr(error)})
        torch.cuda.empty_cache()
        # After each: who runs out of time has the others.
        _write(output, result)
    print(f"\n{time.monotonic() - started_s:.0f} s")


def _measure(point: Point, ceilings: Ceilings) -> dict[str, Any]:
    us = time_us(point.call, point.num_sets)
    floor_us = ceilings.floor_us(point.num_bytes, point.flop)
    result: dict[str, Any] = {
        "shape": point.shape,
        "us": round(us, 2),
        "floor_us": round(floor_us, 2),
        "note": point.note,
    }
    if floor_us >= _MIN_FLOOR_US:
        result["times_floor"] = round(us / floor_us, 3)
    library_us: dict[str, float] = {}
    for name, call in point.library.items():
        try:
            library_us[name] = time_us(call, point.num_sets)
        except RuntimeError as error:  # A backend that does not take the shape.
            result.setdefault("library_errors", {})[name] = str(error)[:200]
    if library_us:
        best = min(library_us, key=lambda name: library_us[name])
        result["library"] = best
        result["library_us"] = round(library_us[best], 2)
        result["times_library"] = round(us / library_us[best], 3)
    return result


def _print(row: dict[str, Any]) -> None:
    line = f"{row['kernel']:18}{row['shape']:30}{row['us']:9.1f}{row['floor_us']:9.1f}"
    line += f"{row['times_floor']:7.2f}" if "times_floor" in row else " " * 7
    if "library" in row:
        line += f"{row['library_us']:9.1f}{row['times_library']:7.2f}  {row['library']}"
    print(f"{line}  {row['note']}".rstrip(), flush=True)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", choices=list(POINTS), default=[])
    tunes = parser.add_mutually_exclusive_group()
    tunes.add_argument("--tune", action="store_true", help="measure skinny_linear's table instead")
    tunes.add_argument("--tune-experts", action="store_true", help="or that of experts' products")
    parser.add_argument(
        "--shape",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,...",
        help="well-known models whose products are added to the table that there is; default: the "
        "table is made anew, of llama-8b's products, of all known experts",
    )
    parser.add_argument("--budget", type=float, default=230.0, help="seconds for a table")
    parser.add_argument(
        "--compile",
        choices=("first", "only", "skip"),
        default="first",
        help="of --tune-experts: what is tried, before it is timed, or in a run of its own",
    )
    parser.add_argument("--output", type=Path, help="a file, or a directory for it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
