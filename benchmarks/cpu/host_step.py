"""What the host does for a decode step, here and in another checkout: `python -m
benchmarks.cpu.host_step --before DIR`.

The engine loop of a worker over the demo model, whose layers are left out: what remains is
planning, drawing, bookkeeping and messages. Two processes, one of each tree, take turns of a few
steps; compared is the CPU time of the thread, in which what else the machine does shows as far as
they share caches and cores: its lowest twentieth, and the median of the turns' ratios. Beside it,
what a step takes with its layers, so that it is known what share of it the difference is.
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
    parser.add_argument("--serve", type=int, metavar="BATCH", help=argparse.SUPPRESS)
    parser.add_argument("--with-layers", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve is not None:
        _serve(args.serve, with_layers=args.with_layers)
        return 0
    if args.before is None:
        parser.error("--before: the other tree is missing")
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
        """µs of CPU time a step."""
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


class _NoLayers:
    """In place of a model; logits are the same in each step."""

    def __init__(self, config: Any) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self._hidden = torch.zeros(512, config.hidden_size)
        self._logits = torch.randn(64, config.vocab_size, generator=generator)

    def hidden_states(
        self, input_ids: Any, positions: Any, caches: Any, plans: Any, wanted: Any = None
    ) -> Any:
        return self._hidden[: len(input_ids) if wanted is None else len(wanted[0])]

    def logits(self, hidden: Any) -> Any:
        return self._logits[: len(hidden)].clone()


if __name__ == "__main__":
    sys.exit(main())
