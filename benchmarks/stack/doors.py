"""What the ways in cost: `python -m benchmarks.stack.doors`.

    engine   tokens per second of the in-process engine loop, and of the same engine behind a
             gateway, over gRPC and over HTTP, at 1, 8 and 32 streams; in turn, so that ratios are
             of neighbours in time. One worker of role `both` on the CPU.
    gateway  tokens per second that one gateway process carries when the worker behind it has no
             engine (null_worker.py) and offers tokens as fast as they are taken.

Clients are this process. Where they, gateway and worker share cores, the gateway's CPU time per
token is what counts: a gateway with a core of its own carries one over that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import uvloop

from baton.loadtest.drivers import driver_for
from baton.loadtest.environment import describe_environment
from baton.loadtest.samples import OK, Sample, Watch
from baton.loadtest.target import Target
from baton.shared.directory.embedded import EmbeddedValkey
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.interrupt import exit_code
from baton.shared.model_files.named import model_dir
from benchmarks.checkout import DEMO_MODEL, RESULTS, set_import_path
from benchmarks.in_process import InProcessEngine
from benchmarks.stack.launched import cpu_s
from benchmarks.stack.served import served, started

_PROMPT_TOKENS = 100
_NULL_PROMPT_TOKENS = 16
_MIN_S = 2.0
"""A run of few streams is repeated until it is that long."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse_args(argv)
    set_import_path()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"environment": describe_environment(), "model": args.model.name}
    if "engine" in args.parts:
        result["engine"] = _measure_engine(args)
    if "gateway" in args.parts:
        result["gateway"] = _measure_gateway(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {args.output}")


# The same engine, three ways in


def _measure_engine(args: argparse.Namespace) -> list[dict[str, Any]]:
    config = EngineConfig(args.model, device="cpu", dtype="float32", num_blocks=2048)
    engine = InProcessEngine(ModelRunner(config))
    counts = ("--both", "1", "--prefill", "0", "--decode", "0")
    rows = []
    print(f"{'streams':>8} {'tokens/s':>10} {'gRPC':>8} {'HTTP':>8}   of the engine's")
    with served(args.model, num_threads=1, counts=counts, http=True) as addresses:
        targets = [Target.parse(f"{door}://{addresses[door]}") for door in ("grpc", "http")]
        for num_streams in args.streams:
            row = _measure_streams(engine, targets, num_streams, args)
            rows.append(row)
            own = statistics.median(row["in_process"])
            grpc, http = (statistics.median(row[name]) for name in ("grpc", "http"))
            of_own = f"{row['grpc_ratio']:.2f} and {row['http_ratio']:.2f}"
            print(f"{num_streams:8} {own:10.1f} {grpc:8.1f} {http:8.1f}   {of_own}", flush=True)
    return rows


def _measure_streams(
    engine: InProcessEngine, targets: Sequence[Target], num_streams: int, args: argparse.Namespace
) -> dict[str, Any]:
    row: dict[str, Any] = {"num_streams": num_streams, "in_process": [], "grpc": [], "http": []}
    for repetition in range(args.repetitions + 1):
        rates = [_rate_in_process(engine, num_streams, args.new_tokens)]
        rates += [
            uvloop.run(_rate_over(target, args.model.name, num_streams, args.new_tokens))
            for target in targets
        ]
        if repetition > 0:  # the first one warms up
            for name, rate in zip(("in_process", "grpc", "http"), rates, strict=True):
                row[name].append(rate)
    for door in ("grpc", "http"):
        pairs = zip(row[door], row["in_process"], strict=True)
        row[f"{door}_ratio"] = statistics.median(a / b for a, b in pairs)
    return row


def _rate_in_process(engine: InProcessEngine, num_streams: int, new_tokens: int) -> float:
    num_tokens, started_s = 0, time.perf_counter()
    while num_tokens == 0 or time.perf_counter() - started_s < _MIN_S:
        for prompt in random_prompts(num_streams, _PROMPT_TOKENS):
            engine.submit(prompt, new_tokens)
        num_tokens += sum(engine.run_until_idle().num_tokens)
    return num_tokens / (time.perf_counter() - started_s)


async def _rate_over(target: Target, model: str, num_streams: int, new_tokens: int) -> float:
    samples: list[Sample] = []
    started_s = time.monotonic()
    while not samples or time.monotonic() - started_s < _MIN_S:
        prompts = random_prompts(num_streams, _PROMPT_TOKENS)
        samples += await ask_all(target, model, prompts, new_tokens)
    return sum(sample.num_tokens for sample in samples) / (time.monotonic() - started_s)


async def ask_all(
    target: Target, model: str, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Sample]:
    """All at once. Raises RuntimeError when one of them fails."""
    driver = driver_for(target, model)
    try:
        watches = [Watch(Sample(0.0), time.monotonic()) for _ in prompts]
        await asyncio.gather(
            *(
                driver.ask(driver.encode(prompt, new_tokens), watch)
                for prompt, watch in zip(prompts, watches, strict=True)
            )
        )
    finally:
        await driver.close()
    samples = [watch.sample for watch in watches]
    for sample in samples:
        if sample.status != OK or sample.num_tokens != new_tokens:
            raise RuntimeError(f"{target}: {sample.status} {sample.detail}".rstrip())
    return samples


def random_prompts(num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Different in every call: nothing is found in the prefix cache."""
    return [random.choices(range(256, 4096), k=num_tokens) for _ in range(num_prompts)]


# One gateway, no engine


def _measure_gateway(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    print(f"\n{'door':>6} {'streams':>8} {'tokens/s':>10} {'tokens a message':>17} ", end="")
    print(f"{'gateway, µs a token':>20} {'tokens/s of a core':>19}")
    with null_stack(args.model) as (pid, addresses):
        for num_streams in args.null_streams:
            for door in ("grpc", "http"):
                target = Target.parse(f"{door}://{addresses[door]}")
                row = _measure_door(target, pid, num_streams, args)
                rows.append({"door": door, "num_streams": num_streams, **row})
                print(
                    f"{door:>6} {num_streams:8} {row['tokens_per_s']:10,.0f} "
                    f"{row['tokens_per_message']:17.2f} {row['gateway_us_per_token']:20.1f} "
                    f"{row['tokens_per_core_s']:19,.0f}",
                    flush=True,
                )
    return rows


def _measure_door(
    target: Target, gateway_pid: int, num_streams: int, args: argparse.Namespace
) -> dict[str, float]:
    prompts = random_prompts(num_streams, _NULL_PROMPT_TOKENS)
    uvloop.run(ask_all(target, args.model.name, prompts, 16))
    samples: list[Sample] = []
    cpu_before_s, started_s = cpu_s(gateway_pid), time.monotonic()
    while not samples or time.monotonic() - started_s < _MIN_S:
        samples += uvloop.run(ask_all(target, args.model.name, prompts, args.null_tokens))
    elapsed_s, used_s = time.monotonic() - started_s, cpu_s(gateway_pid) - cpu_before_s
    num_tokens = sum(sample.num_tokens for sample in samples)
    return {
        "tokens_per_s": num_tokens / elapsed_s,
        "tokens_per_message": num_tokens / sum(sample.num_messages for sample in samples),
        "gateway_us_per_token": 1e6 * used_s / num_tokens,
        "tokens_per_core_s": num_tokens / used_s,
    }


@contextmanager
def null_stack(model: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """A gateway before a worker without engine → its process, and its addresses by door."""
    with ExitStack() as stack:
        valkey = stack.enter_context(EmbeddedValkey())
        common = ["--model", str(model), "--redis-url", valkey.url]
        stack.enter_context(started("benchmarks.stack.null_worker", *common))
        ports = ["--port", "0", "--http-port", "0", "--log-level", "warning"]
        gateway, addresses = stack.enter_context(started("baton.services.gateway", *common, *ports))
        uvloop.run(_until_answers(Target.parse(f"http://{addresses['http']}"), model.name))
        yield gateway.pid, addresses


async def _until_answers(target: Target, model: str) -> None:
    """The gateway hears of the worker by the directory."""
    async with asyncio.timeout(20):
        while True:
            try:
                await ask_all(target, model, random_prompts(1, _NULL_PROMPT_TOKENS), 1)
                return
            except RuntimeError:
                await asyncio.sleep(0.1)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stack.doors", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--parts", nargs="+", choices=("engine", "gateway"), default=["engine", "gateway"])
    add("--model", type=model_dir, default=DEMO_MODEL, help="default: the demo model")
    add("--streams", type=int, nargs="+", default=[1, 8, 32], help="of the engine part")
    add("--new-tokens", type=int, default=64)
    add("--repetitions", type=int, default=5)
    add("--null-streams", type=int, nargs="+", default=[1, 32, 256], help="of the gateway part")
    add("--null-tokens", type=int, default=512, help="of each stream")
    add("--output", type=Path, default=RESULTS / "doors.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
