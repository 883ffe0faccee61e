"""What guessing costs where it brings nothing: text that drafts badly.

    python -m benchmarks.gpu.falling_guesses [--shape llama-8b] [--drafts 4]
        [--batches 1,8,32,128] [--right 0,0.2] [--draft-shape llama-1b | --head 32000]

As benchmarks.gpu.speculation, but the worker's own policy (services/decode/draft_lengths.py) says
how many guesses are checked. The engine decodes with guesses and without, in turns of many steps,
since the GPU's clock drifts; the policy remembers what it has learnt, as a worker's does.

ngram   looks guesses up as ever, here in text that repeats itself, and each is made wrong
oracle  guesses that are right with a chance, made for nothing
model   a smaller model, or a head, whose guesses fall: it was trained on nothing

slower   by what part a token takes longer with guesses than without: the median of the turns;
         `first` of the first turn, in which the policy knows nothing yet
probing  the part of the time with guesses that steps which checked some took longer than the
         median of those that did not
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from baton.loadtest.environment import describe_environment
from baton.services.decode.draft_lengths import DraftLengths
from baton.services.decode.drafters import Draft, Drafter, NgramDrafter
from baton.services.worker.drafting import Drafting
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.sequence import Sequence as Answer
from benchmarks.gpu.measured_engine import list_of
from benchmarks.gpu.results import result_path, results_name
from benchmarks.gpu.speculation import (
    Oracle,
    add_guessing_flags,
    make_all_alike,
    make_guessing_runner,
    model_drafter,
)
from benchmarks.in_process import InProcessEngine

_STARTING_STEPS = 8
"""That all have tokens and are not counted: their launches still meet prompts."""


class NotedLengths(DraftLengths):
    """The policy, and what it was told of steps."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.steps: list[tuple[int, float]] = []
        """Guesses in a step, and its seconds."""

    def took_step(self, seconds: float, *, num_rows: int, num_guesses: int) -> None:
        super().took_step(seconds, num_rows=num_rows, num_guesses=num_guesses)
        self.steps.append((num_guesses, seconds))


class WrongNgrams(NgramDrafter):
    """Finds guesses as ever, and makes each the token behind it."""

    def drafts(self, wanted: Sequence[tuple[Answer, int]]) -> list[Draft]:
        return [
            draft._replace(token_ids=[token_id + 1 for token_id in draft.token_ids])
            for draft in super().drafts(wanted)
        ]


@dataclass
class Turns:
    """Milliseconds of a token of a sequence, turn by turn."""

    plain_ms: list[float] = field(default_factory=list)
    guessed_ms: list[float] = field(default_factory=list)
    steps: list[tuple[int, float]] = field(default_factory=list)
    """With guesses, of all turns but the first."""

    def row(self) -> dict[str, Any]:
        slower = [g / p - 1 for g, p in zip(self.guessed_ms, self.plain_ms, strict=True)]
        plain_s = median(seconds for num_guesses, seconds in self.steps if not num_guesses)
        probing_s = sum(seconds - plain_s for num_guesses, seconds in self.steps if num_guesses)
        return {
            "ms": median(self.guessed_ms[1:]),
            "plain_ms": median(self.plain_ms[1:]),
            "slower": median(slower[1:]),
            "first": slower[0],
            "probing": probing_s / sum(seconds for _, seconds in self.steps),
            "steps_with_guesses": sum(bool(num_guesses) for num_guesses, _ in self.steps),
            "num_guesses": sum(num_guesses for num_guesses, _ in self.steps),
            "steps": len(self.steps),
            "slower_by_turn": slower[1:],
        }


def measure(
    runner: ModelRunner,
    drafter: Drafter,
    per_step: float,
    batch: int,
    context: int,
    num_steps: int,
    num_turns: int,
) -> Turns:
    """`per_step`: tokens of a sequence that are expected at most."""
    lengths = NotedLengths(runner.num_drafts)
    guessing = Drafting(drafter, lengths, runner.num_drafts)
    # However many are guessed, all of them may be checked.
    budget = max(runner.token_budget, batch * (1 + runner.num_drafts))
    engines = [
        InProcessEngine(runner, max_num_seqs=batch, token_budget=budget, drafting=drafting)
        for drafting in (None, guessing)
    ]
    _share_blocks(*engines)
    prompts = [engine.cached_prompts(batch, context) for engine in engines]
    ms_per_token(engines[0], prompts[0], 1, num_steps // 4)
    turns = Turns()
    for number in range(num_turns + 1):
        turns.plain_ms.append(ms_per_token(engines[0], prompts[0], 1, num_steps))
        lengths.steps.clear()
        turns.guessed_ms.append(ms_per_token(engines[1], prompts[1], per_step, num_steps))
        if number:
            turns.steps += lengths.steps
    return turns


def _share_blocks(one: InProcessEngine, other: InProcessEngine) -> None:
    """Each gets every second block, as both write to the same memory."""
    for group in range(len(one.runner.groups)):
        pools = [engine.pools.of(group) for engine in (one, other)]
        block_ids = [pool.allocate(pool.num_free) for pool in pools]
        for first, (pool, ids) in enumerate(zip(pools, block_ids, strict=True)):
            pool.release(sorted(ids)[first::2])


def ms_per_token(
    engine: InProcessEngine, prompts: Sequence[Sequence[int]], per_step: float, num_steps: int
) -> float:
    """Of each of the prompts' answers, all together, without their start and end."""
    batch = len(prompts)
    num_starting = _STARTING_STEPS + batch // 4
    for prompt in prompts:
        engine.submit(prompt, int(per_step * (num_starting + 1.1 * num_steps)) + num_starting)
    steps = engine.run_until_idle()
    full = steps.full(batch, num_steps, num_starting)
    num_tokens = sum(steps.num_tokens[full[0] + 1 : full[-1] + 1])
    return (steps.at_s[full[-1]] - steps.at_s[full[0]]) * 1e3 * batch / num_tokens


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    output = result_path(args.output, results_name("falling_guesses"))
    started_s = time.monotonic()
    runner = make_guessing_runner(args)
    print(f"{args.shape}: ready after {time.monotonic() - started_s:.1f} s", flush=True)
    if args.compile_only:
        return 0
    token_id = make_all_alike(runner, guesses_too=False)
    rows: list[dict[str, Any]] = []
    result = {
        "environment": describe_environment(),
        "shape": args.shape,
        "draft_shape": args.draft_shape,
        "head": args.head,
        "drafts": args.drafts,
        "context": args.context,
        "steps": args.steps,
        "turns": args.turns,
        "rows": rows,
    }
    for batch in args.batches:
        for name, drafter, per_step in _drafters(args, runner, token_id):
            sizes = batch, args.context, args.steps, args.turns
            turns = measure(runner, drafter, per_step, *sizes)
            row = {"batch": batch, "guesses": name, **turns.row()}
            rows.append(row)
            print(_line(row), flush=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {output}")
    return 0


def _drafters(
    args: argparse.Namespace, runner: ModelRunner, token_id: int
) -> Iterator[tuple[str, Drafter, float]]:
    """Names, and how many tokens a step is expected to bring at most."""
    if runner.draft is not None:
        yield "model", model_drafter(runner.draft), 1
        return
    yield "ngram", WrongNgrams(), 1
    for chance in args.right:
        yield f"oracle {chance:g}", Oracle(token_id, chance), 1 / (1 - chance)


def _line(row: dict[str, Any]) -> str:
    by_turn = " ".join(f"{100 * each:+.2f}" for each in row["slower_by_turn"])
    return (
        f"{row['batch']:4} {row['guesses']:10} {row['ms']:.3f} ms, without {row['plain_ms']:.3f}:"
        f" slower by {100 * row['slower']:.2f} % ({by_turn}), first {100 * row['first']:.2f} %;"
        f" probing {100 * row['probing']:.2f} %, {row['num_guesses']} guesses in"
        f" {row['steps_with_guesses']} of {row['steps']} steps"
    )


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.falling_guesses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_guessing_flags(parser)
    add = parser.add_argument
    add("--right", type=list_of(float), default=[0, 0.2], help="chances of the oracle's guesses")
    add("--steps", type=int, default=200, help="of a turn")
    add("--turns", type=int, default=4, help="with guesses and without, each")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
