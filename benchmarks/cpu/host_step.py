"""What the host does for a decode step, here and in another checkout: `python -m
benchmarks.cpu.host_step --before DIR`.

The engine loop of a worker over the demo model, whose layers are left out: what remains is
planning, drawing, bookkeeping and messages. Two processes, one of each tree, take turns of a few
steps; compared is the CPU time of the thread, in which what else the machine does shows as far as
they share caches and cores: its lowest twentieth, and the median of the turns' ratios. Beside it,
what a step takes with its layers, so that it is known what share of it the difference is.

With `--behind N`: what the host does from the arrival of a prompt, of which all but the last 64
tokens are N cached ones, to its first token, by the clock. Layers are left out here as well, and
the sums of blocks' bytes, which a GPU makes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkout import RESULTS

_ROOT = Path(__file__).parents[2]
_BATCHES = (1, 8, 32)
_STEPS_A_TURN = 10
_MOST_STEPS = 4000
_NUM_NEW = 64
"""Tokens of a prompt behind cached ones."""


@dataclass(frozen=True)
class Row:
    batch: int
    before_us: float
    after_us: float
    ratio: float
    """The median of the turns'."""
    whole_step_us: float
    percent_of_step: float
    """That the difference is."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.host_step", description=__doc__)
    parser.add_argument("--before", type=Path, help="the other tree, with its stubs generated")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS / "host_step_cpu.json")
    parser.add_argument("--behind", type=int, metavar="N", help="prompts behind N cached tokens")
    parser.add_argument("--serve", type=int, metavar="BATCH", help=argparse.SUPPRESS)
    parser.add_argument("--with-layers", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve is not None:
        if args.behind is not None:
            _serve_prompts(args.behind)
        else:
            _serve(args.serve, with_layers=args.with_layers)
        return 0
    if args.before is None:
        parser.error("--before: the other tree is missing")
    if args.behind is not None:
        _compare_prompts(args.behind, args.before, args.turns)
        return 0
    # Only the tree that is measured is imported by those who measure it.
    from baton.loadtest.environment import describe_environment

    rows = [_compare(batch, args.before, args.turns) for batch in _BATCHES]
    result = {
        "environment": describe_environment(),
        "turns": args.turns,
        "rows": [asdict(row) for row in rows],
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _compare(batch: int, before: Path, num_turns: int) -> Row:
    with ExitStack() as stack:
        trees = [stack.enter_context(_Tree(tree, batch)) for tree in (before.resolve(), _ROOT)]
        turns: list[list[float]] = [[], []]
        for number in range(num_turns):
            for which in (0, 1) if number % 2 else (1, 0):
                turns[which].append(trees[which].take_turn())
    with _Tree(_ROOT, batch, "--with-layers") as whole:
        step_us = _low([whole.take_turn() for _ in range(max(4, num_turns // 8))])
    first, second = map(_low, turns)
    ratio = statistics.median(b / a for a, b in zip(*turns, strict=True))
    row = Row(batch, first, second, ratio, step_us, 100 * (second - first) / step_us)
    print(
        f"batch {batch}: {first:.0f} -> {second:.0f} us, turns {100 * (ratio - 1):+.1f} %, "
        f"{row.percent_of_step:+.2f} % of a step of {step_us:.0f} us",
        flush=True,
    )
    return row


def _compare_prompts(num_cached: int, before: Path, num_turns: int) -> None:
    with ExitStack() as stack:
        trees = [
            stack.enter_context(_Tree(tree, 1, "--behind", str(num_cached)))
            for tree in (before.resolve(), _ROOT)
        ]
        turns: list[list[float]] = [[], []]
        for number in range(num_turns):
            for which in (0, 1) if number % 2 else (1, 0):
                turns[which].append(trees[which].take_turn())
    medians = [statistics.median(times) for times in turns]
    least = [min(times) for times in turns]
    print(
        f"64 behind {num_cached}: medians {medians[0]:.0f} -> {medians[1]:.0f} us, "
        f"least {least[0]:.0f} -> {least[1]:.0f} us"
    )


def _low(times_us: Sequence[float]) -> float:
    return sorted(times_us)[len(times_us) // 20]


class _Tree:
    """A process that runs steps of a tree's engine when it is asked to."""

    def __init__(self, tree: Path, batch: int, *flags: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", str(batch), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env=environment,
        )

    def __enter__(self) -> _Tree:
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise RuntimeError("the engine does not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)

    def take_turn(self) -> float:
        """µs of CPU time a step, or until a first token."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def _serve(batch: int, *, with_layers: bool) -> None:
    """Of the tree that is on the path, whichever that is."""
    import torch

    from baton.shared.engine.config import EngineConfig
    from baton.shared.engine.model_runner import ModelRunner
    from benchmarks.in_process import InProcessEngine

    source = Path(sys.modules[ModelRunner.__module__].__file__ or "").resolve()
    if not source.is_relative_to(Path.cwd()):
        raise RuntimeError(f"{source} is not of {Path.cwd()}")
    torch.set_num_threads(1)
    model_dir = Path.cwd() / "models" / "demo"
    num_blocks = batch * (_MOST_STEPS // 16 + 4)
    runner = ModelRunner(EngineConfig(model_dir, device="cpu", num_blocks=num_blocks))
    if not with_layers:
        executor: Any = runner._executor
        executor._model = _NoLayers(runner.model_config)
    engine = InProcessEngine(runner, max_num_seqs=batch)
    for number in range(batch):
        prompt = random.Random(number).choices(range(8, runner.model_config.vocab_size), k=24)
        engine.submit(prompt, _MOST_STEPS)
    run = engine.engine.run_once
    # Prompts, and until all is warm.
    for _ in range(batch + 40):
        run(may_wait=False)
    gc.collect()
    gc.disable()
    print("ready", flush=True)
    for _ in sys.stdin:
        started_s = time.thread_time()
        for _ in range(_STEPS_A_TURN):
            run(may_wait=False)
        print(1e6 * (time.thread_time() - started_s) / _STEPS_A_TURN, flush=True)


def _serve_prompts(num_cached: int) -> None:
    import torch

    from baton.shared.engine.config import EngineConfig
    from baton.shared.engine.model_runner import ModelRunner
    from benchmarks.in_process import InProcessEngine
    from models.dummy_model import given_or_dummy

    torch.set_num_threads(1)
    length = num_cached + _NUM_NEW
    with given_or_dummy(None, "tiny") as model_dir:
        config = EngineConfig(model_dir, device="cpu", load_format="dummy", num_blocks=length // 4)
        runner = ModelRunner(config)
    executor: Any = runner._executor
    executor._model = _NoLayers(runner.model_config, most_tokens=length)
    engine = InProcessEngine(runner, with_digests=False)
    draw = random.Random(0).choices
    tokens = range(runner.model_config.vocab_size)
    prefix = draw(tokens, k=num_cached)
    engine.submit(prefix, 1)
    engine.run_until_idle()
    gc.collect()
    gc.disable()
    print("ready", flush=True)
    for _ in sys.stdin:
        prompt = [*prefix, *draw(tokens, k=_NUM_NEW)]
        started_s = time.perf_counter()
        engine.submit(prompt, 1)
        print(1e6 * (engine.run_until_idle().at_s[-1] - started_s), flush=True)


class _NoLayers:
    """In place of a model; logits are the same in each step."""

    def __init__(self, config: Any, most_tokens: int = 512) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self._hidden = torch.zeros(most_tokens, config.hidden_size)
        self._logits = torch.randn(64, config.vocab_size, generator=generator)

    def hidden_states(
        self, input_ids: Any, positions: Any, caches: Any, plans: Any, wanted: Any = None
    ) -> Any:
        return self._hidden[: len(input_ids) if wanted is None else len(wanted[0])]

    def logits(self, hidden: Any) -> Any:
        return self._logits[: len(hidden)].clone()


if __name__ == "__main__":
    sys.exit(main())
