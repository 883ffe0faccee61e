"""A made-up trace of Mooncake's form: conversations that share beginnings.

    python -m baton.loadtest.synthetic_trace --requests 1000 --rate 4 > trace.jsonl

A request either begins a conversation, with one of a few system prompts, or continues one: then its
prompt has all blocks of the request before, and new ones. Arrivals are gamma distributed, lengths
log-normal.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.loadtest.traces import BLOCK_TOKENS


@dataclass(frozen=True)
class Shape:
    """`again`: the share of requests that continue a conversation. Lengths are medians, in tokens,
    of what each request adds."""

    num_requests: int = 1000
    rate: float = 4.0
    burstiness: float = 1.5
    again: float = 0.4
    num_system_prompts: int = 4
    system_blocks: int = 2
    prompt_tokens: int = 1500
    output_tokens: int = 200
    num_open: int = 64
    """Conversations that may be continued."""
    seed: int = 0


_SPREAD = 0.8


def synthetic_trace(shape: Shape) -> Iterator[dict[str, object]]:
    """Entries in order of arrival; a function of `shape`."""
    draw = random.Random(shape.seed)
    next_block = shape.num_system_prompts * shape.system_blocks
    at_s = 0.0
    conversations: list[list[int]] = []
    for _ in range(shape.num_requests):
        goes_on = bool(conversations) and draw.random() < shape.again
        if goes_on:
            said = conversations.pop(draw.randrange(len(conversations)))
        else:
            first = draw.randrange(shape.num_system_prompts) * shape.system_blocks
            said = list(range(first, first + shape.system_blocks))
        num_new = _length(draw, shape.prompt_tokens)
        new_blocks = range(next_block, next_block - (-num_new // BLOCK_TOKENS))
        next_block = new_blocks.stop
        blocks = [*said, *new_blocks]
        yield {
            "timestamp": round(1e3 * at_s),
            "input_length": len(said) * BLOCK_TOKENS + num_new,
            "output_length": _length(draw, shape.output_tokens),
            "hash_ids": blocks,
        }
        # The request that continues this one repeats its full blocks.
        conversations.append([*said, *new_blocks[: num_new // BLOCK_TOKENS]])
        del conversations[: -shape.num_open]
        gamma = 1 / shape.burstiness**2
        at_s += draw.gammavariate(gamma, 1 / (gamma * shape.rate))


def _length(draw: random.Random, median: int) -> int:
    return max(1, round(median * math.exp(draw.gauss(0.0, _SPREAD))))


def main(argv: Sequence[str] | None = None) -> int:
    default = Shape()
    parser = argparse.ArgumentParser(
        prog="python -m baton.loadtest.synthetic_trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--requests", type=int, default=default.num_requests)
    add("--rate", type=float, default=default.rate, help="requests a second")
    add("--burstiness", type=float, default=default.burstiness, help="Poisson has 1")
    add("--again", type=float, default=default.again, help="share that goes on, 0 to 1")
    add("--prompt-tokens", type=int, default=default.prompt_tokens, help="new ones, median")
    add("--output-tokens", type=int, default=default.output_tokens, help="median")
    add("--seed", type=int, default=default.seed)
    args = parser.parse_args(argv)
    counts = (args.requests, args.prompt_tokens, args.output_tokens)
    if not (args.rate > 0 and args.burstiness > 0 and 0 <= args.again <= 1 and min(counts) > 0):
        parser.error("counts and rates must be above 0, --again between 0 and 1")
    shape = Shape(
        num_requests=args.requests,
        rate=args.rate,
        burstiness=args.burstiness,
        again=args.again,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        seed=args.seed,
    )
    for entry in synthetic_trace(shape):
        print(json.dumps(entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
