"""The whole stack under a rate of requests, for three arrangements of two workers.

    python -m benchmarks.stack.serving --arrangement pd-local \\
        --workload 2048:256 --rates 10,16,22,28 --workload 8192:256 --rates 3,4,5,6,7.5

replicas  two workers of role `both`
pd        one prefill, one decode
pd-local  one prefill, and one `both` that decodes, and computes the prompts by itself that the
          prefill worker could not compute in time

Starts directory, gateway and workers, warms them up, offers each rate for some seconds, and prints
TTFT, TPOT and the longest gap at the client, and the share of requests within two SLOs, beside what
vLLM 0.26 was measured at (recorded.py). One JSON for each workload.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from baton.loadtest.environment import describe_environment
from baton.loadtest.report import Report, Run
from baton.loadtest.samples import warnings
from baton.loadtest.spec import Load
from baton.shared.interrupt import exit_code
from baton.shared.model_files.info import load_model_info
from benchmarks.checkout import RESULTS, set_import_path
from benchmarks.stack.arrangements import (
    ARRANGEMENTS,
    add_stack_flags,
    measure_rates,
    stack_options,
)
from benchmarks.stack.launched import (
    BenchmarkStack,
    StackFailed,
    StackOptions,
    running,
)
from benchmarks.stack.recorded import VLLM, Recorded
from models.dummy_model import given_or_dummy

TPOT_SLOS_S = (0.010, 0.025)
_LONG_PROMPT_TOKENS = 4096
_SEEDS = 1000
"""Between two workloads: prompts of one shall not begin as those of another do."""
_REQUEST_LIMIT_S = 120.0
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
    options = _stack_options(args, model_dir)
    started_s = time.monotonic()
    async with running(options) as stack:
        start_s = time.monotonic() - started_s
        print(f"{args.arrangement}: serving after {start_s:.0f} s", flush=True)
        for workload in args.workloads:
            runs = await _measure(args, stack, workload, load_model_info(model_dir).vocab_size)
            result = {
                "arrangement": args.arrangement,
                "model": model_dir.name,
                "prompt_tokens": workload.prompt_tokens,
                "output_tokens": workload.output_tokens,
                "duration_s": args.duration,
                "ttft_slo_s": workload.ttft_slo_s,
                "start_s": round(start_s, 1),
                # Without paths, which are those of one machine.
                "flags": {
                    n: str(v)
                    for n, v in vars(args).items()
                    if n != "workloads" and not isinstance(v, Path)
                },
                "environment": environment,
                "points": [{"rate": run.rate, **run.summary} for run in runs],
            }
            path = args.output_dir / (
                f"serving_{args.arrangement}_{workload.prompt_tokens}_{workload.output_tokens}.json"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=2) + "\n")
            print(f"written to {path}", flush=True)
            if args.report is not None:
                title = f"{args.arrangement}, {workload.name} tokens"
                directory = args.report / f"{args.arrangement}_{workload.name.replace(':', '_')}"
                Report(title, {"model": model_dir.name, **environment}, runs).write(directory)
                print(f"written to {directory}", flush=True)


async def _measure(
    args: argparse.Namespace, stack: BenchmarkStack, workload: Workload, vocab_size: int
) -> list[Run]:
    load = Load(
        target=f"grpc://{stack.address}",
        prompt_tokens=str(workload.prompt_tokens),
        output_tokens=str(workload.output_tokens),
        duration_s=args.duration,
        drain_s=args.drain,
        timeout_s=_REQUEST_LIMIT_S,
        vocab_size=vocab_size,
    )
    slos = [(workload.ttft_slo_s, tpot_s) for tpot_s in TPOT_SLOS_S]
    runs = []
    print(f"\n{_HEAD}", flush=True)
    measured = measure_rates(
        stack,
        load,
        workload.rates,
        slos,
        num_clients=args.clients,
        label=args.arrangement,
        first_seed=1 + _SEEDS * args.workloads.index(workload),
    )
    async for run in measured:
        runs.append(run)
        _print_point(args.arrangement, workload, run.rate or 0.0, run.summary)
    return runs


def _print_point(
    arrangement: str, workload: Workload, rate: float, summary: dict[str, Any]
) -> None:
    ttft, tpot = (
        [summary[name][p] for p in ("p50", "p90", "p99")] for name in ("ttft_ms", "tpot_ms")
    )
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


def _stack_options(args: argparse.Namespace, model_dir: Path) -> StackOptions:
    gateway_flags: tuple[str, ...] = ()
    if args.arrangement == "pd-local":
        gateway_flags += ("--local-prefill-tokens", str(args.local_prefill_tokens))
        gateway_flags += ("--local-prefill-share", str(args.local_prefill_share))
        if args.late_after_s is not None:
            gateway_flags += ("--late-after-s", str(args.late_after_s))
    return stack_options(
        args,
        ARRANGEMENTS[args.arrangement],
        model_dir,
        longest=max(w.prompt_tokens + w.output_tokens for w in args.workloads),
        gateway_flags=gateway_flags,
    )


def _gpus() -> dict[str, str]:
    """Names and driver; nothing where there are none."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"gpus": "; ".join(lines.strip().splitlines())}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stack.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--arrangement", choices=ARRANGEMENTS, required=True)
    add("--workload", action="append", metavar="IN:OUT", help="tokens; may be repeated")
    add("--rates", action="append", metavar="R,R", help="requests a second, for each workload")
    add("--duration", type=float, default=22.0, help="seconds of arrivals at each rate")
    add("--drain", type=float, default=20.0, help="seconds that the last ones get after that")
    add("--clients", type=int, default=1, help="load generators")
    add("--local-prefill-tokens", type=int, default=16384, help="the gateway's, for pd-local")
    add("--local-prefill-share", type=float, default=0.5, help="the gateway's, for pd-local")
    add("--late-after-s", type=float, help="the gateway's, for pd-local; default: nothing is held")
    add("--report", type=Path, metavar="DIR", help="report.html and more, by workload")
    add("--output-dir", type=Path, default=RESULTS)
    add_stack_flags(parser, device="cuda")
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
    sys.exit(exit_code(main))
