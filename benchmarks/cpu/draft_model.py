"""What the demo's draft model brings on a CPU, by how many guesses are checked: `python -m
benchmarks.cpu.draft_model`.

The engine loop of a worker, every guess checked, in turns of a round for each number of guesses.
What a step takes is CPU time of the thread, in which what else the machine does shows as far as
they share caches and cores: medians of the rounds' medians.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer

from baton.loadtest.environment import describe_environment
from baton.services.decode.model_drafter import ModelDrafter
from baton.services.worker import engine_loop, stepper
from baton.services.worker.drafting import Drafting
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.sampling import SamplingParams
from benchmarks.checkout import DEMO_MODEL, RESULTS
from benchmarks.every_guess import EveryGuess
from benchmarks.in_process import InProcessEngine

_PROMPT = "Once there was a man who had two sons and no land of his own, and"
_MOST = 4


class Measured(EveryGuess):
    """Keeps what full steps took."""

    def __init__(self, most: int, num_rows: int) -> None:
        super().__init__(most)
        self._shape = num_rows, num_rows * most
        self.seconds: list[float] = []

    def took_step(self, seconds: float, *, num_rows: int, num_guesses: int) -> None:
        if (num_rows, num_guesses) == self._shape:
            self.seconds.append(seconds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.draft_model", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--output", type=Path, default=RESULTS / "draft_model_cpu.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    _count_cpu_time()
    runner = ModelRunner(
        EngineConfig(
            DEMO_MODEL,
            "cpu",
            num_drafts=_MOST,
            num_blocks=1024,
            draft_model_dir=DEMO_MODEL.parent / "demo-draft",
        )
    )
    rows: list[dict[str, Any]] = []
    for num_streams in (1, 8):
        for temperature in (0.0, 1.0):
            how = [SamplingParams(temperature=temperature, seed=n) for n in range(num_streams)]
            rows += _measure(runner, how, args.rounds, args.tokens)
    result = {"environment": describe_environment(), "rounds": args.rounds, "rows": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _measure(
    runner: ModelRunner, how: list[SamplingParams], num_rounds: int, num_tokens: int
) -> list[dict[str, Any]]:
    step_s: dict[int, list[float]] = {k: [] for k in range(_MOST + 1)}
    tokens: dict[int, float] = {}
    for _ in range(num_rounds):
        for k, seen in step_s.items():
            seconds, tokens[k] = _round(runner, how, k, num_tokens)
            seen.append(seconds)
    plain_s = median(step_s[0])
    rows = []
    for k, seen in step_s.items():
        row = {
            "streams": len(how),
            "temperature": how[0].temperature,
            "guesses": k,
            "step_ms": median(seen) * 1e3,
            "tokens_per_step": tokens[k],
            "speed_up": tokens[k] * plain_s / median(seen),
        }
        rows.append(row)
        shown = (f"{name} {round(value, 3)}" for name, value in row.items())
        print("  ".join(shown), flush=True)
    return rows


def _round(
    runner: ModelRunner, how: list[SamplingParams], k: int, num_tokens: int
) -> tuple[float, float]:
    """Seconds of a step of all streams, and tokens that it brings each."""
    assert runner.draft is not None
    lengths = Measured(k, len(how))
    drafting = Drafting(ModelDrafter(runner.draft), lengths, _MOST)
    engine = InProcessEngine(runner, max_num_seqs=len(how), drafting=drafting)
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    prompt = tokenizer.encode(_PROMPT).ids
    for params in how:
        engine.submit(prompt, num_tokens, params)
    engine.run_until_idle()
    counters = engine.engine._counters
    per_step = 1 + counters["accepted_tokens"] / max(counters["drafts"], 1)
    return median(lengths.seconds), per_step


def _count_cpu_time() -> None:
    """Steps are timed by what the thread has computed."""
    clock: Any = SimpleNamespace(monotonic=time.thread_time, sleep=time.sleep)
    engine_loop.time = clock  # type: ignore[attr-defined]
    stepper.time = clock  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
