"""Workers in one arrangement or another, started as a stack, under rates of requests."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from baton.loadtest.report import Run
from baton.loadtest.run import run_load
from baton.loadtest.samples import summarise
from baton.loadtest.spec import Load
from baton.services.launcher.roles import RoleCounts, StackConfig
from baton.shared.model_files.named import model_dir
from baton.shared.rpc.flags import length_or_auto
from benchmarks.stack.launched import BenchmarkStack, StackFailed, StackOptions, cpu_s
from models.dummy_model import SHAPES

ARRANGEMENTS = {
    "replicas": RoleCounts(prefill=0, decode=0, both=2),
    "pd": RoleCounts(prefill=1, decode=1, both=0),
    "pd-local": RoleCounts(prefill=1, decode=0, both=1),
}
_NUM_WARM_UP = 24
_WARM_UP_TOKENS = 32
_SETTLE_S = 0.5


def add_stack_flags(parser: argparse.ArgumentParser, *, device: str) -> None:
    """`device`: the default."""
    add = parser.add_argument
    add("--gpus", default="0,1", help="by worker: prefill first, then decode or both")
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--model", type=model_dir, help="default: a dummy of --shape")
    add("--shape", choices=SHAPES, default="llama-8b")
    add("--num-blocks", type=int, help="of each pool; default: the worker's")
    add("--block-size", type=int, default=16)
    add("--max-model-len", type=length_or_auto, help="default: the longest workload")
    add("--worker-flags", default="", help='more flags for all workers, "--threads 2"')
    add("--prefill-flags", default="", help="more flags for prefill workers")
    add("--decode-flags", default="", help="more flags for workers that decode")
    add("--gateway-flags", default="", help="more flags for the gateway")
    add("--redis-url", help="default: a private Valkey")
    add("--start-limit", type=float, default=300.0, help="seconds until it must serve")
    add("--log", type=Path, help="write the roles' lines there")


def stack_options(
    args: argparse.Namespace,
    counts: RoleCounts,
    model_dir: Path,
    *,
    longest: int,
    gateway_flags: Sequence[str] = (),
) -> StackOptions:
    """Of `add_stack_flags`. `longest`: tokens of the longest request."""
    config = StackConfig(
        model_dir=model_dir,
        counts=counts,
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
        "gateway": (*shlex.split(args.gateway_flags), *gateway_flags),
    }
    gpus = () if args.device == "cpu" else tuple(args.gpus.split(","))
    return StackOptions(config, gpus, flags, start_limit_s=args.start_limit, log=args.log)


async def measure_rates(
    stack: BenchmarkStack,
    load: Load,
    rates: Sequence[float],
    slos: Sequence[tuple[float, float]],
    *,
    num_clients: int,
    label: str,
    first_seed: int = 1,
) -> AsyncIterator[Run]:
    """One run for each rate, Poisson, after a warm-up; `gateway_cpu` (cores) is in its summary.

    Each rate has a seed of its own, whatever the others are. Raises StackFailed.
    """
    await _warm_up(load, stack)
    for rate in rates:
        stack.check()
        gateway = stack.pids()["gateway"]
        cpu_before_s, before_s = cpu_s(gateway), time.monotonic()
        # The same requests at the same times for every arrangement.
        offered = await run_load(load.at(rate, seed=first_seed + round(10 * rate)), num_clients)
        elapsed_s = time.monotonic() - before_s
        summary = summarise(offered, slos)
        summary["gateway_cpu"] = round((cpu_s(gateway) - cpu_before_s) / elapsed_s, 3)
        stack.check()
        yield Run(f"{label} {rate:g}/s", rate, summary, offered.samples)
        await asyncio.sleep(_SETTLE_S)


async def _warm_up(load: Load, stack: BenchmarkStack) -> None:
    """Whatever is compiled, allocated or connected at first use."""
    offer = load.in_turn(_NUM_WARM_UP, num_streams=_NUM_WARM_UP // 2, output_tokens=_WARM_UP_TOKENS)
    if load.output_tokens.isdigit():
        fewest = min(_WARM_UP_TOKENS, int(load.output_tokens))
        offer = replace(offer, output_tokens=str(fewest))
    summary = summarise(await run_load(offer), [])
    stack.check()
    if summary["statuses"] != {"OK": _NUM_WARM_UP}:
        raise StackFailed(f"requests of the warm-up failed: {summary['problems']}")
