"""Prefill and decode on separate workers against the same workers in role `both`: where is the
break-even?

    python -m benchmarks.stack.ab --workload 512:16 --workload 128:64 --rates 3,6,9,12

As many workers of the same model and flags behind the same gateway and router, the same requests at
the same moments; as prefill + decode, then all as `both`, and the other way round for every second
pair of lengths: a machine that drifts favours neither. For each pair and each rate: TTFT, TPOT, the
longest gaps and goodput of either, and the rates at which they cross.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from baton.loadtest.ab_report import METRICS, Comparison, Summary, html, measuring_order, text
from baton.loadtest.environment import describe_environment
from baton.loadtest.samples import Slo, warnings
from baton.loadtest.spec import Load
from baton.services.launcher.roles import RoleCounts
from baton.shared.interrupt import exit_code
from baton.shared.model_files.info import load_model_info
from benchmarks.checkout import RESULTS, set_import_path
from benchmarks.stack.arrangements import add_stack_flags, measure_rates, stack_options
from benchmarks.stack.launched import StackFailed, running
from models.dummy_model import given_or_dummy

_SEEDS = 1000
_REQUEST_LIMIT_S = 120.0
DEFAULT_WORKLOADS = ("512:16", "128:64")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    set_import_path()
    environment = describe_environment()
    try:
        with given_or_dummy(args.model, args.shape) as model_dir:
            measured = asyncio.run(_measure_all(args, model_dir))
            facts = _facts(args, model_dir.name) | environment
    except StackFailed as error:
        print(error, file=sys.stderr)
        return 1
    comparisons = [
        Comparison(workload, args.rates, measured["pd"][workload], measured["both"][workload])
        for workload in args.workloads
    ]
    print(text(comparisons))
    _write(args, comparisons, facts)
    return 0


def _arrangements(num_workers: int) -> dict[str, RoleCounts]:
    """With an odd number the one more decodes."""
    num_prefill = num_workers // 2
    return {
        "pd": RoleCounts(prefill=num_prefill, decode=num_workers - num_prefill, both=0),
        "both": RoleCounts(prefill=0, decode=0, both=num_workers),
    }


async def _measure_all(
    args: argparse.Namespace, model_dir: Path
) -> dict[str, dict[str, list[Summary]]]:
    """Arrangement → workload → summaries by rate."""
    arrangements = _arrangements(args.workers)
    measured: dict[str, dict[str, list[Summary]]] = {name: {} for name in arrangements}
    for name, workloads in measuring_order(args.workloads, list(arrangements)):
        measured[name] |= await _measure(args, name, arrangements[name], workloads, model_dir)
    return measured


async def _measure(
    args: argparse.Namespace,
    name: str,
    counts: RoleCounts,
    workloads: Sequence[str],
    model_dir: Path,
) -> dict[str, list[Summary]]:
    """Workload → summaries by rate, of one stack."""
    lengths = {workload: _lengths(workload) for workload in args.workloads}
    options = stack_options(args, counts, model_dir, longest=max(map(sum, lengths.values())))
    vocab_size = load_model_info(model_dir).vocab_size
    slo = Slo(*args.slo)
    found: dict[str, list[Summary]] = {}
    async with running(options) as stack:
        for workload in workloads:
            prompt_tokens, output_tokens = lengths[workload]
            load = Load(
                target=f"grpc://{stack.address}",
                prompt_tokens=str(prompt_tokens),
                output_tokens=str(output_tokens),
                duration_s=args.duration,
                drain_s=args.drain,
                timeout_s=_REQUEST_LIMIT_S,
                vocab_size=vocab_size,
            )
            found[workload] = []
            async for run in measure_rates(
                stack,
                load,
                args.rates,
                [slo],
                num_clients=args.clients,
                label=name,
                first_seed=1 + _SEEDS * args.workloads.index(workload),
            ):
                found[workload].append(run.summary)
                print(f"{workload} {run.label}: {_line(run.summary)}", flush=True)
    return found


def _line(summary: Summary) -> str:
    told = [f"{metric.name} {metric.of(summary):.3g}" for metric in METRICS]
    return ", ".join([*told, *(f"WARNING: {line}" for line in warnings(summary))])


def _facts(args: argparse.Namespace, model: str) -> dict[str, str]:
    return {
        "model": model,
        "workers": f"{args.workers} in each arrangement",
        "limits": f"TTFT {args.slo[0]:g} s, TPOT {args.slo[1]:g} s",
        "seconds at each rate": f"{args.duration:g}",
        "flags of workers": args.worker_flags,
    }


def _write(
    args: argparse.Namespace, comparisons: Sequence[Comparison], facts: dict[str, str]
) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"facts": facts, "workloads": [one.as_json() for one in comparisons]}
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    page_path = args.html or args.output.with_suffix(".html")
    page_path.parent.mkdir(parents=True, exist_ok=True)
    page_path.write_text(html(comparisons, facts))
    print(f"written to {args.output} and {page_path}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stack.ab", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--workload", action="append", metavar="IN:OUT", help="tokens; may be repeated")
    add("--rates", default="3,6,9,12", metavar="R,R", help="requests a second")
    add("--workers", type=int, default=2, help="in each arrangement, at least 2")
    add("--duration", type=float, default=6.0, help="seconds of arrivals at each rate")
    add("--drain", type=float, default=20.0, help="seconds that the last ones get after that")
    add("--slo", default="0.25:0.015", metavar="TTFT:TPOT", help="seconds, for goodput")
    add("--clients", type=int, default=1, help="load generators")
    add("--output", type=Path, default=RESULTS / "ab.json")
    add("--html", type=Path, help="default: beside --output")
    add_stack_flags(parser, device="cpu")
    args = parser.parse_args(argv)
    args.workloads = list(dict.fromkeys(args.workload or DEFAULT_WORKLOADS))
    try:
        args.rates = sorted(float(rate) for rate in args.rates.split(","))
        args.slo = tuple(map(float, args.slo.split(":")))
        is_right = len(args.slo) == 2 and min(args.rates) > 0
        is_right = is_right and min(min(_lengths(one)) for one in args.workloads) > 0
    except ValueError:
        is_right = False
    if not is_right:
        parser.error("--workload IN:OUT, --rates R,R and --slo TTFT:TPOT: numbers above 0")
    if args.workers < 2:
        parser.error("--workers: at least 2")
    return args


def _lengths(workload: str) -> tuple[int, int]:
    """Raises ValueError."""
    prompt_tokens, output_tokens = map(int, workload.split(":"))
    return prompt_tokens, output_tokens


if __name__ == "__main__":
    sys.exit(exit_code(main))
