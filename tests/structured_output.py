"""Answers under many JSON schemas, in real processes: `python -m tests.structured_output`.

A prefill worker and two decode workers serve the demo model. Batches of constrained streams, every
second one sampled, beside some that are not constrained, are asked

    plain       without guesses
    guessing    with `--speculate ngram`
    killed      again and again: the decode worker of the longest answer dies when that has 10, 20,
                ... tokens
    resumed     at every tenth token of every answer, by a client that has the tokens before

Every answer must be valid by its schema, and its tokens those of the plain one. Prints a report,
and ends with 1 when one is not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.v1 import types_pb2
from tests.device import ROOT
from tests.e2e.harness import Result, Stack
from tests.faults.streams import Background, events
from tests.schemas import Schema, is_valid, make_schema

WORKERS = {"p0": "prefill", "d0": "decode", "d1": "decode"}
_PROMPT = "And he wrote it down in a book, and these are the words of the book:"
_MAX_TOKENS = 300
_KILLS_AT = (10, 20, 30, 40)


@dataclass
class Report:
    num_schemas: int = 0
    num_answers: int = 0
    num_valid: int = 0
    num_cut: int = 0
    """By max_tokens: no JSON."""
    num_tokens: int = 0
    num_guessed_answers_equal: int = 0
    num_accepted_guesses: int = 0
    num_kills: int = 0
    num_answers_hit: int = 0
    num_answers_hit_equal: int = 0
    num_resumed: int = 0
    num_resumed_equal: int = 0
    num_free_equal: int = 0
    num_free: int = 0
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return (
            self.num_valid + self.num_cut == self.num_answers == self.num_schemas
            and self.num_guessed_answers_equal == self.num_answers
            and self.num_answers_hit_equal == self.num_answers_hit
            and self.num_resumed_equal == self.num_resumed
            and self.num_free_equal == self.num_free
        )


@dataclass
class Ask:
    prompt: str
    options: dict[str, Any]
    schema: Schema | None = None


def constrained(seed: int, prompt: str) -> Ask:
    schema = make_schema(seed)
    constraint = types_pb2.Constraint(json_schema=json.dumps(schema), compact_json=True)
    sampling = {"temperature": 0.9, "seed": seed} if seed % 2 else {}
    options = {"max_tokens": _MAX_TOKENS, "ignore_eos": False, "constraint": constraint}
    return Ask(prompt, {**options, **sampling}, schema)


def asks_of(seeds: Sequence[int], *, num_free: int = 8) -> list[Ask]:
    """`num_free`: of them, those that are not constrained."""
    asks = [constrained(seed, f"{_PROMPT} {seed}") for seed in seeds]
    free = [Ask(f"{_PROMPT} free {index}", {"max_tokens": 60}) for index in range(num_free)]
    return asks + free


def run_batch(
    stack: Stack, asks: Sequence[Ask], report: Report, kills_at: Sequence[int] = _KILLS_AT
) -> None:
    plain = stack.generate_at_once(
        [(ask.prompt, {**ask.options, "speculate": False}) for ask in asks]
    )
    for ask, result in zip(asks, plain, strict=True):
        if ask.schema is None:
            continue
        report.num_schemas += 1
        report.num_answers += 1
        report.num_tokens += len(result.token_ids)
        is_cut = result.finish_reason == types_pb2.FINISH_REASON_LENGTH
        report.num_cut += is_cut
        if not is_cut:
            good = is_valid(result.text, ask.schema)
            report.num_valid += good
            if not good:
                print(f"invalid: {result.text!r} by {json.dumps(ask.schema)}", file=sys.stderr)
    before = num_accepted(stack)
    guessing = stack.generate_at_once([(ask.prompt, ask.options) for ask in asks])
    report.num_accepted_guesses += num_accepted(stack) - before
    for ask, one, other in zip(asks, plain, guessing, strict=True):
        is_equal = _same(one, other)
        if ask.schema is None:
            report.num_free += 1
            report.num_free_equal += is_equal
        else:
            report.num_guessed_answers_equal += is_equal
    bound = [i for i, ask in enumerate(asks) if ask.schema is not None]
    longest = max(bound, key=lambda i: len(plain[i].token_ids))
    for at in kills_at:
        if at < len(plain[longest].token_ids):
            killed(stack, asks, plain, longest, at, report)
    resumed(stack, asks, plain, report)


def killed(
    stack: Stack, asks: Sequence[Ask], plain: Sequence[Result], lead: int, at: int, report: Report
) -> None:
    num_workers = len(stack.status().workers)
    streams = [Background(stack, ask.prompt, **ask.options) for ask in asks]
    stack.wait_until(lambda: streams[lead].num_tokens >= at or streams[lead].is_over)
    victim = next(
        name
        for name in ("d0", "d1", "d2")
        if name in stack.processes and events(stack, name, "joined", streams[lead].request_id)
    )
    stack.kill(victim)
    report.num_kills += 1
    stack.restart(victim)
    for ask, one, stream in zip(asks, plain, streams, strict=True):
        other = stream.result()
        if ask.schema is not None and other.attempts > 1:
            report.num_answers_hit += 1
            report.num_answers_hit_equal += _same(one, other)
    stack.wait_until(lambda: len(stack.status().workers) == num_workers)


def resumed(stack: Stack, asks: Sequence[Ask], plain: Sequence[Result], report: Report) -> None:
    parts = [
        (ask, whole, cut)
        for ask, whole in zip(asks, plain, strict=True)
        if ask.schema is not None
        for cut in range(10, len(whole.token_ids), 10)
    ]
    rests = stack.generate_at_once(
        [
            (
                ask.prompt,
                {**ask.options, "seed": whole.seed, "received": whole.token_ids[:cut]},
            )
            for ask, whole, cut in parts
        ]
    )
    for (_, whole, cut), rest in zip(parts, rests, strict=True):
        report.num_resumed += 1
        report.num_resumed_equal += whole.token_ids[cut:] == rest.token_ids


def num_accepted(stack: Stack) -> int:
    return sum(stack.state(name).counters.num_accepted_tokens for name in ("d0", "d1"))


def _same(one: Result, other: Result) -> bool:
    return (one.token_ids, one.text, one.finish_reason) == (
        other.token_ids,
        other.text,
        other.finish_reason,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.structured_output", description=__doc__)
    parser.add_argument("--num-schemas", type=int, default=500)
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report, started_s = Report(), time.monotonic()
    with (
        tempfile.TemporaryDirectory() as directory,
        Stack(
            ROOT / "models" / "demo",
            Path(directory),
            dict(WORKERS),
            worker_flags={name: ["--speculate", "ngram:4"] for name in ("d0", "d1")},
            flags=["--num-blocks", "1024", "--token-budget", "256", "--max-num-seqs", "64"],
        ) as stack,
    ):
        for first in range(0, args.num_schemas, args.batch):
            seeds = range(first, min(first + args.batch, args.num_schemas))
            run_batch(stack, asks_of(seeds), report)
            report.seconds = round(time.monotonic() - started_s, 1)
            print(json.dumps(asdict(report)), flush=True)
        stack.assert_idle()
    if args.out is not None:
        args.out.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
