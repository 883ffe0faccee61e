"""The whole stack under a rate of requests, for three arrangements of two workers.

    python -m benchmarks.serving --arrangement pd-local \\
        --workload 2048:256 --rates 10,16,22,28 --workload 8192:256 --rates 3,4,5,6,7.5

replicas  two workers of role `both`
pd        one prefill, one decode
pd-local  one prefill, and one `both` that decodes, and computes the prompts by itself that the
          prefill worker could not compute in time

Starts directory, gateway and workers, warms them up, offers each rate for some seconds, and prints
TTFT, TPOT and the longest gap at the client, and the share of requests within two SLOs, beside what
vLLM 0.26 was measured at (benchmarks/recorded.py). One JSON for each workload.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.dummy_model import SHAPES, given_or_dummy
from benchmarks.environment import describe_environment
from benchmarks.load import Load, run_load
from benchmarks.recorded import VLLM, Recorded
from benchmarks.samples import summarise, warnings
from benchmarks.stack import (
    ROOT,
    BenchmarkStack,
    StackFailed,
    StackOptions,
    cpu_s,
    running,
    set_import_path,
)
from services.launcher.plan import RoleCounts, StackConfig
from shared.engine.config import load_model_config

RESULTS = ROOT / "benchmarks" / "results"
ARRANGEMENTS = {
    "replicas": RoleCounts(prefill=0, decode=0, both=2),
    "pd": RoleCounts(prefill=1, decode=1, both=0),
    "pd-local": RoleCounts(prefill=1, decode=0, both=1),
}
TPOT_SLOS_S = (0.010, 0.025)
_LONG_PROMPT_TOKENS = 4096
_NUM_WARM_UP = 24
_WARM_UP_TOKENS = 32
_SETTLE_S = 0.5
_MAX_GATEWAY_CPU = 0.8
_HEAD = (
    f"{'in:out':>9} {'rate':>5} {'':16} {'TTFT p50':>9} {'p90':>6} {'p99':>6}"
    f" {'TPOT p50':>9} {'p90':>6} {'p99':>6} {'gap p90':>8}"
    f" {'SLO 10':>7} {'SLO 25':>7} {'alone':>6}"
)


class Workload(NamedTuple):
    """`rates`: requests a second."""

    prompt_tokens: int
    output_tokens: int
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens}:{self.output_tokens}"

    @property
    def ttft_slo_s(self) -> float:
        return 1.0 if self.prompt_tokens < _LONG_PROMPT_TOKENS else 2.0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    set_import_path()
    try:
        with given_or_dummy(args.model, args.shape) as model_dir:
            asyncio.run(_measure_all(args, model_dir))
    except StackFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


async def _measure_all(args: argparse.Namespace, model_dir: Path) -> None:
    environment = describe_environment() | _gpus()
    options = stack_options(args, model_dir)
    started_s = time.monotonic()
    async with running(options) as stack:
        start_s = time.monotonic() - started_s
        print(f"{args.arrangement}: serving after {start_s:.0f} s", flush=True)
        for workload in args.workloads:
            points = await _measure(args, stack, workload, load_model_config(model_dir).vocab_size)
            result = {
                "arrangement": args.arrangement,
                "model": model_dir.name,
                "prompt_tokens": workload.prompt_tokens,
                "output_tokens": workload.output_tokens,
                "duration_s": args.duration,
                "ttft_slo_s": workload.ttft_slo_s,
                "start_s": round(start_s, 1),
                "flags": {n: str(v) for n, v in vars(args).items() if n != "workloads"},
                "environment": environment,
                "points": points,
            }
            path = args.output_dir / (
                f"serving_{args.arrangement}_{workload.prompt_tokens}_{workload.output_tokens}.json"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=2) + "\n")
            print(f"written to {path}", flush=True)


async def _measure(
    args: argparse.Namespace, stack: BenchmarkStack, workload: Workload, vocab_size: int
) -> list[dict[str, Any]]:
    load = Load(
        target=stack.address,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        duration_s=args.duration,
        drain_s=args.drain,
        vocab_size=vocab_size,
    )
    await _warm_up(load, stack)
    slos = [(workload.ttft_slo_s, tpot_s) for tpot_s in TPOT_SLOS_S]
    points = []
    print(f"\n{_HEAD}", flush=True)
    for number, rate in enumerate(workload.rates):
        stack.check()
        gateway = stack.pids()["gateway"]
        cpu_before_s, before_s = cpu_s(gateway), time.monotonic()
        # The same requests at the same times for every arrangement.
        offer = load.at(rate, seed=number + 1)
        summary = summarise(await run_load(offer, args.clients), slos)
        elapsed_s = time.monotonic() - before_s
        summary["gateway_cpu"] = round((cpu_s(gateway) - cpu_before_s) / elapsed_s, 3)
        stack.check()
        points.append({"rate": rate, **summary})
        _print_point(args.arrangement, workload, rate, summary)
        await asyncio.sleep(_SETTLE_S)
    return points


async def _warm_up(load: Load, stack: BenchmarkStack) -> None:
    """Whatever is compiled, allocated or connected at first use."""
    output_tokens = min(_WARM_UP_TOKENS, load.output_tokens)
    offer = load.in_turn(_NUM_WARM_UP, num_streams=_NUM_WARM_UP // 2, output_tokens=output_tokens)
    summary = summarise(await run_load(offer), [])
    stack.check()
    if summary["statuses"] != {"OK": _NUM_WARM_UP}:
        raise StackFailed(f"requests of the warm-up failed: {summary['statuses']}")


def _print_point(
    arrangement: str, workload: Workload, rate: float, summary: dict[str, Any]
) -> None:
    ttft, tpot = (tuple(summary[name].values()) for name in ("ttft_ms", "tpot_ms"))
    attained = tuple(slo["attained"] for slo in summary["slo"])
    gap, alone = summary["longest_gap_ms"]["p90"], summary["local_share"]
    head = f"{workload.name:>9} {rate:>5g}"
    print(_line(head, arrangement, ttft, tpot, gap, attained, alone))
    known = VLLM.get((workload.prompt_tokens, workload.output_tokens), {}).get(rate, {})
    for name, recorded in known.items():
        print(_recorded_line(name, recorded))
    for line in warnings(summary):
        print(f"  WARNING: {line}")
    if summary["gateway_cpu"] > _MAX_GATEWAY_CPU:
        print(f"  WARNING: the gateway used {summary['gateway_cpu']:.2f} cores; it has one")
    sys.stdout.flush()


def _recorded_line(name: str, recorded: Recorded) -> str:
    attained = (None, recorded.attained)
    gap = recorded.gap_p90
    return _line(" " * 15, f"  vLLM {name}", recorded.ttft, recorded.tpot, gap, attained, None)


def _line(
    head: str,
    name: str,
    ttft: Sequence[float | None],
    tpot: Sequence[float | None],
    gap: float | None,
    attained: Sequence[float | None],
    alone: float | None,
) -> str:
    cells = [_cell(ttft[0], 9, 0), *(_cell(value, 6, 0) for value in ttft[1:])]
    cells += [_cell(tpot[0], 9, 1), *(_cell(value, 6, 1) for value in tpot[1:])]
    cells += [_cell(gap, 8, 0), *(_percent(value, 7) for value in attained), _percent(alone, 6)]
    return f"{head} {name:16} {' '.join(cells)}"


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width},.{digits}f}"


def _percent(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.0%}"


def stack_options(args: argparse.Namespace, model_dir: Path) -> StackOptions:
    longest = max(w.prompt_tokens + w.output_tokens for w in args.workloads)
    config = StackConfig(
        model_dir=model_dir,
        counts=ARRANGEMENTS[args.arrangement],
        port=0,
        device=args.device,
        dtype=args.dtype,
        redis_url=args.redis_url,
        cluster=f"serving-{time.time_ns()}",
        num_blocks=args.num_blocks,
        block_size=args.block_size,
        max_model_len=args.max_model_len or longest,
        drain_s=2.0,
    )
    workers = shlex.split(args.worker_flags)
    if args.model is None:
        workers = ["--load-format", "dummy", *workers]
    flags = {
        "prefill": (*workers, *shlex.split(args.prefill_flags)),
        "decode": (*workers, *shlex.split(args.decode_flags)),
        "both": (*workers, *shlex.split(args.decode_flags)),
        "gateway": tuple(shlex.split(args.gateway_flags)),
    }
    if args.arrangement == "pd-local":
        flags["gateway"] += ("--local-prefill-tokens", str(args.local_prefill_tokens))
        flags["gateway"] += ("--local-prefill-share", str(args.local_prefill_share))
    gpus = () if args.device == "cpu" else tuple(args.gpus.split(","))
    return StackOptions(config, gpus, flags, start_limit_s=args.start_limit, log=args.log)


def _gpus() -> dict[str, str]:
    """Names and driver; nothing where there are none."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"gpus": "; ".join(lines.strip().splitlines())}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--arrangement", choices=ARRANGEMENTS, required=True)
    add("--workload", action="append", metavar="IN:OUT", help="tokens; may be repeated")
    add("--rates", action="append", metavar="R,R", help="requests a second, for each workload")
    add("--duration", type=float, default=22.0, help="seconds of arrivals at each rate")
    add("--drain", type=float, default=20.0, help="seconds that the last ones get after that")
    add("--clients", type=int, default=1, help="load generators")
    add("--gpus", default="0,1", help="by worker: prefill first, then decode or both")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--model", type=Path, help="default: a dummy of --shape")
    add("--shape", choices=SHAPES, default="llama-8b")
    add("--num-blocks", type=int, help="of each pool; default: the worker's")
    add("--block-size", type=int, default=16)
    add("--max-model-len", type=int, help="default: the longest workload")
    add("--worker-flags", default="", help='more flags for all workers, "--threads 2"')
    add("--prefill-flags", default="", help="more flags for prefill workers")
    add("--decode-flags", default="", help="more flags for workers that decode")
    add("--gateway-flags", default="", help="more flags for the gateway")
    add("--local-prefill-tokens", type=int, default=24576, help="the gateway's, for pd-local")
    add("--local-prefill-share", type=float, default=0.25, help="the gateway's, for pd-local")
    add("--redis-url", help="default: a private Valkey")
    add("--start-limit", type=float, default=300.0, help="seconds until it must serve")
    add("--log", type=Path, help="write the roles' lines there")
    add("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    workloads, rates = args.workload or ["2048:256"], args.rates or ["10,16,22,28"]
    if len(workloads) != len(rates):
        parser.error("give --rates for each --workload, in the same order")
    try:
        args.workloads = [_workload(*pair) for pair in zip(workloads, rates, strict=True)]
    except ValueError as error:
        parser.error(f"--workload IN:OUT and --rates R,R: {error}")
    return args


def _workload(lengths: str, rates: str) -> Workload:
    """Raises ValueError."""
    prompt_tokens, output_tokens = map(int, lengths.split(":"))
    return Workload(prompt_tokens, output_tokens, tuple(float(rate) for rate in rates.split(",")))


if __name__ == "__main__":
    sys.exit(main())
