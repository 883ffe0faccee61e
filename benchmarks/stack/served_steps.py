"""A decode step as the engine takes it, and as clients of the whole stack see it.

    python -m benchmarks.stack.served_steps [--batches 1,32,128,256] [--context 1024]

engine  the engine loop in one process: no RPC, no gateway (as `benchmarks.gpu.engine` measures it)
served  gateway and one worker of role `both`; clients in processes of their own. A step is the time
        in which each stream gets a token, while all of them decode

One after the other on the same GPU, with the same model, batches and contexts, `served` first.
Prompts are computed before, so that all streams start together from the prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from baton.loadtest.environment import describe_environment
from baton.loadtest.timeline import NUM_WARM_UP, Window, window_of
from baton.services.launcher.roles import RoleCounts, StackConfig
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.interrupt import exit_code
from baton.shared.model_files.info import load_model_info
from baton.shared.model_files.named import model_dir
from benchmarks.checkout import RESULTS
from benchmarks.in_process import InProcessEngine, random_prompts
from benchmarks.stack.launched import StackFailed, StackOptions, running
from benchmarks.stack.stream_clients import StreamClients
from models.dummy_model import SHAPES, given_or_dummy


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    with given_or_dummy(args.model, args.shape) as model_dir:
        try:
            with StreamClients(max(args.batches)) as clients:
                served = asyncio.run(_served_steps(args, model_dir, clients))
        except StackFailed as error:
            print(error, file=sys.stderr)
            return 1
        engine = _engine_steps(args, model_dir, served)
    points = []
    print(f"\n{'streams':>8} {'engine ms':>10} {'served ms':>10} {'ratio':>7} {'more ms':>8}")
    for batch in args.batches:
        own, seen = engine[batch] * 1e3, served[batch].step_s * 1e3
        points.append({"streams": batch, "engine_ms": own, "served_ms": seen})
        print(f"{batch:>8} {own:>10.2f} {seen:>10.2f} {seen / own:>7.3f} {seen - own:>8.2f}")
    result = {
        "environment": describe_environment(),
        "model": model_dir.name,
        "context": args.context,
        "steps": args.steps,
        "points": points,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {args.output}")
    return 0


def _engine_steps(
    args: argparse.Namespace, model_dir: Path, served: dict[int, Window]
) -> dict[int, float]:
    """By batch, seconds a step, of the same contexts."""
    config = EngineConfig(
        model_dir,
        args.device,
        dtype=args.dtype,
        load_format=_load_format(args),
        max_model_len=_max_model_len(args),
        max_num_seqs=max(args.batches),
    )
    engine = InProcessEngine(ModelRunner(config), max_num_seqs=max(args.batches))
    return {
        batch: statistics.mean(
            engine.decode(batch, args.context + window.num_before, window.num_steps)
        )
        for batch, window in served.items()
    }


async def _served_steps(
    args: argparse.Namespace, model_dir: Path, clients: StreamClients
) -> dict[int, Window]:
    flags = ("--load-format", _load_format(args), "--max-num-seqs", str(max(args.batches)))
    options = StackOptions(
        StackConfig(
            model_dir,
            RoleCounts(prefill=0, decode=0, both=1),
            port=0,
            device=args.device,
            dtype=args.dtype,
            max_model_len=_max_model_len(args),
        ),
        gpus=() if args.device == "cpu" else ("0",),
        role_flags={"both": flags},
    )
    vocab_size = load_model_info(model_dir).vocab_size
    measured = {}
    async with running(options) as stack:
        for batch in args.batches:
            prompts = random_prompts(batch, args.context, vocab_size)
            await clients.ask(stack.address, prompts, 1)
            # Some start before the others are there.
            num_tokens = args.steps + NUM_WARM_UP + batch + 32
            arrivals = await clients.ask(stack.address, prompts, num_tokens)
            stack.check()
            measured[batch] = window_of(arrivals, args.steps)
    return measured


def _max_model_len(args: argparse.Namespace) -> int:
    return int(args.context + args.steps + 4 * max(args.batches) + 256)


def _load_format(args: argparse.Namespace) -> str:
    return "dummy" if args.model is None else "auto"


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stack.served_steps", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--batches", type=_ints, default=[1, 32, 128, 256], help="numbers of streams")
    add("--context", type=int, default=1024, help="tokens of each prompt")
    add("--steps", type=int, default=256, help="decode steps to measure, at most")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--model", type=model_dir, help="default: a dummy of --shape")
    add("--shape", choices=SHAPES, default="llama-8b")
    add("--output", type=Path, default=RESULTS / "served_steps.json")
    return parser.parse_args(argv)


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(exit_code(main))
