"""Short prompts through gateway and workers, with prompt graphs and without: time to the first
token when some are asked for at once, and time per token of streams beside prompts.

    python -m benchmarks.stack.short_prompts --arrangement both --gpus 0
    python -m benchmarks.stack.short_prompts --arrangement pd --gpus 0,1

Two stacks of the same workers serve on the same GPUs, one of them with --no-prompt-graphs, and are
asked in turn, several times: a machine that drifts favours neither.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from baton.loadtest.environment import describe_environment
from baton.loadtest.run import run_load
from baton.loadtest.samples import summarise
from baton.loadtest.spec import Load
from baton.services.launcher.roles import RoleCounts
from baton.shared.interrupt import exit_code
from baton.shared.model_files.info import load_model_info
from benchmarks.checkout import set_import_path
from benchmarks.gpu.results import result_path, results_name
from benchmarks.stack.arrangements import add_stack_flags, stack_options
from benchmarks.stack.launched import BenchmarkStack, StackFailed, StackOptions, running
from models.dummy_model import given_or_dummy

_ARRANGEMENTS = {
    "both": RoleCounts(prefill=0, decode=0, both=1),
    "pd": RoleCounts(prefill=1, decode=1, both=0),
}
_VARIANTS: dict[str, tuple[str, ...]] = {"graphs": (), "launched": ("--no-prompt-graphs",)}
_TURNS = 3
_ANSWER, _LONG_ANSWER = 4, 96
_STREAMS = 16
_GPU_SHARE = 0.44


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    set_import_path()
    try:
        with given_or_dummy(args.model, args.shape) as model_dir:
            result = asyncio.run(_measure(args, model_dir))
    except StackFailed as error:
        print(error, file=sys.stderr)
        return 1
    result["environment"] = describe_environment()
    output = result_path(args.output, results_name(f"short_prompts_{args.arrangement}"))
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {output}")
    return 0


async def _measure(args: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    load = Load(
        target="",
        prompt_tokens=str(args.prompt_tokens),
        vocab_size=load_model_info(model_dir).vocab_size,
    )
    started_s = time.monotonic()
    async with AsyncExitStack() as exits:
        stacks: list[BenchmarkStack] = await asyncio.gather(
            *(
                exits.enter_async_context(running(_options(args, model_dir, flags)))
                for flags in _VARIANTS.values()
            )
        )
        print(f"serving after {time.monotonic() - started_s:.0f} s", flush=True)
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        by_name = dict(zip(_VARIANTS, stacks, strict=True))
        for stack in stacks:
            await _ask(stack, load.in_turn(24, num_streams=12, output_tokens=16))
        for turn in range(_TURNS):
            for name, stack in by_name.items():
                await _ask_all(args, stack, load, turn, found[name])
                stack.check()
    points = {
        name: {what: statistics.median(times) for what, times in each.items()}
        for name, each in found.items()
    }
    print(f"{'ms, medians of turns':<40}" + "".join(f"{name:>10}" for name in points))
    for what in next(iter(points.values())):
        print(f"{what:<40}" + "".join(f"{each[what]:>10.2f}" for each in points.values()))
    return {"arrangement": args.arrangement, "prompt_tokens": args.prompt_tokens, "ms": points}


async def _ask_all(
    args: argparse.Namespace,
    stack: BenchmarkStack,
    load: Load,
    turn: int,
    found: dict[str, list[float]],
) -> None:
    """`found`: what → milliseconds, of each turn."""
    for num_streams in args.streams:
        offer = load.in_turn(
            max(6 * num_streams, 24), num_streams=num_streams, output_tokens=_ANSWER
        )
        summary = await _ask(stack, replace(offer, seed=100 * turn + num_streams))
        for quantile in ("p50", "p90"):
            what = f"TTFT {quantile}, {num_streams} at once"
            found[what].append(summary["ttft_ms"][quantile])
    offer = load.in_turn(3 * _STREAMS, num_streams=_STREAMS, output_tokens=_LONG_ANSWER)
    summary = await _ask(stack, replace(offer, seed=7 * turn + 1))
    for quantile in ("p50", "p90"):
        what = f"TPOT {quantile}, {_STREAMS} streams beside prompts"
        found[what].append(summary["tpot_ms"][quantile])


async def _ask(stack: BenchmarkStack, load: Load) -> dict[str, Any]:
    summary = summarise(await run_load(replace(load, target=f"grpc://{stack.address}"), 1), [])
    if set(summary["statuses"]) != {"OK"}:
        raise StackFailed(f"requests failed: {summary['problems']}")
    return summary


def _options(args: argparse.Namespace, model_dir: Path, flags: Sequence[str]) -> StackOptions:
    longest = args.prompt_tokens + _LONG_ANSWER
    own = argparse.Namespace(**vars(args))
    share = ["--gpu-memory-utilization", str(_GPU_SHARE)] if args.device == "cuda" else []
    own.worker_flags = " ".join([args.worker_flags, *share, *flags])
    own.max_model_len = args.max_model_len or 4 * longest
    return stack_options(own, _ARRANGEMENTS[args.arrangement], model_dir, longest=longest)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stack.short_prompts", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--arrangement", choices=_ARRANGEMENTS, required=True)
    add("--prompt-tokens", type=int, default=512)
    add("--streams", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    add("--output", type=Path, help="a file, or a directory for it")
    add_stack_flags(parser, device="cuda")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
