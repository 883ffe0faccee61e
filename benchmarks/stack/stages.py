"""Where the time of one request goes, stage by stage: `python -m benchmarks.stack.stages`.

A prefill and a decode worker (`--arrangement pd`), or one that does both, with a model whose steps
are short, so that most of the time is everybody else's. Gateway, workers and this client note
moments on the clock that all processes of a host share (`--trace-dir`); a stage is what lies
between two of them, and of each the median over requests is shown, beside its least.

Prompts are of `--prompts` tokens, new ones (`cold`) or with all but their last 64 tokens in the
caches (`hit`), asked one at a time or `--streams` at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from baton.loadtest.drivers import request_of
from baton.loadtest.environment import describe_environment
from baton.services.launcher.roles import RoleCounts
from baton.shared.interrupt import exit_code
from baton.shared.model_files.info import load_model_info
from baton.shared.rpc.serve import internal_channel
from baton.v1 import inference_service_pb2_grpc as pb_grpc
from benchmarks.checkout import RESULTS, set_import_path
from benchmarks.stack.arrangements import add_stack_flags, stack_options
from benchmarks.stack.launched import StackFailed, running
from models.dummy_model import given_or_dummy

_COUNTS = {"pd": RoleCounts(1, 1, 0), "both": RoleCounts(0, 0, 1)}
_NUM_NEW, _ANSWER, _WARM_UP = 64, 4, 4
_MOST_TOKENS = 8192
"""That are computed at once."""
_SETTLE_S = 1.0
"""Workers tell the directory of their caches behind the answers."""

STAGES = {
    "arrived": "client to gateway",
    "gateway admitted": "gateway: read, check, draw the seed",
    "routed": "gateway: hash, directory, choose",
    "received": "gateway to the worker that computes",
    "worker admitted": "worker: to its engine, hash, find, take blocks",
    "launched": "worker: plan and prepare a step",
    "computed": "worker: steps, until the last is computed",
    "sent": "worker: check, first token to its stream",
    "first at gateway": "worker to gateway",
    "first token": "gateway to client",
    "announced": "hand-off: seal, announce the last blocks",
    "pulled": "hand-off: read and verify",
    "joined": "hand-off: release, answer, join",
    "second token": "step, and to the client",
}
"""Moment → the stage that it ends. Those of a hand-off begin with the last step's end, and are
beside the first token's way."""
_HANDED_OVER = ("computed", "announced", "pulled", "joined", "second token")


@dataclass
class Asked:
    """Moments of one answer, as its client saw them."""

    request_id: str
    asked_s: float
    came_s: list[float]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    set_import_path()
    rows: list[dict[str, Any]] = []
    try:
        with given_or_dummy(args.model, args.shape) as model_dir:
            for arrangement in args.arrangement:
                rows += asyncio.run(_measure(args, arrangement, model_dir))
    except StackFailed as error:
        print(error, file=sys.stderr)
        return 1
    result = {"environment": describe_environment(), "rows": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.output}")
    return 0


async def _measure(
    args: argparse.Namespace, arrangement: str, model_dir: Path
) -> list[dict[str, Any]]:
    measured: dict[tuple[int, str, int], list[Asked]] = {}
    with tempfile.TemporaryDirectory() as traces:
        own = argparse.Namespace(**vars(args))
        own.worker_flags = f"{args.worker_flags} --trace-dir {traces}"
        own.gateway_flags = f"{args.gateway_flags} --trace-dir {traces}"
        longest = max(args.prompts) + _ANSWER
        own.num_blocks = args.num_blocks or 16 * (longest // args.block_size + 2)
        options = stack_options(own, _COUNTS[arrangement], model_dir, longest=longest)
        vocab_size = load_model_info(model_dir).vocab_size
        async with running(options) as stack, internal_channel(stack.address) as channel:
            stub = pb_grpc.InferenceServiceStub(channel)
            for num_tokens, kind, streams in _points(args):
                prefix = random.choices(range(vocab_size), k=max(num_tokens - _NUM_NEW, 0))
                measured[num_tokens, kind, streams] = await _ask_all(
                    stub, num_tokens, prefix if kind == "hit" else [], streams, args, vocab_size
                )
            stack.check()
        moments = _moments(Path(traces))
    rows = []
    for (num_tokens, kind, streams), asked in measured.items():
        row = {
            "arrangement": arrangement,
            "prompt_tokens": num_tokens,
            "kind": kind,
            "streams": streams,
            "stages": _stages(asked, moments),
        }
        rows.append(row)
        _print(row)
    return rows


def _points(args: argparse.Namespace) -> Iterator[tuple[int, str, int]]:
    """(tokens, kind, how many at once), without those that make no sense, or take minutes."""
    for num_tokens, kind, streams in product(args.prompts, args.kinds, args.streams):
        is_short = num_tokens <= _NUM_NEW
        is_long = streams * num_tokens > _MOST_TOKENS
        if not (is_short if kind == "hit" else is_long):
            yield num_tokens, kind, streams


async def _ask_all(
    stub: Any,
    num_tokens: int,
    prefix: Sequence[int],
    streams: int,
    args: argparse.Namespace,
    vocab_size: int,
) -> list[Asked]:
    def prompt() -> list[int]:
        return [*prefix, *random.choices(range(vocab_size), k=num_tokens - len(prefix))]

    for _ in range(_WARM_UP):
        await _ask(stub, prompt())
    if prefix:
        await asyncio.sleep(_SETTLE_S)
    asked: list[Asked] = []
    while len(asked) < args.reps * streams:
        asked += await asyncio.gather(*(_ask(stub, prompt()) for _ in range(streams)))
        # What is behind an answer shall not be in the next one's time.
        await asyncio.sleep(args.pause)
    return asked


async def _ask(stub: Any, prompt: Sequence[int]) -> Asked:
    asked = Asked("", time.monotonic(), [])
    async for response in stub.Generate(request_of(prompt, _ANSWER)):
        if response.HasField("started"):
            asked.request_id = response.started.request_id
        elif response.HasField("chunk"):
            asked.came_s += [time.monotonic()] * len(response.chunk.token_ids)
    return asked


def _moments(traces: Path) -> dict[str, dict[str, float]]:
    """By request id, as gateway and workers noted them."""
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for path in sorted(traces.glob("*.jsonl")):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        is_decode = path.name.startswith("decode")
        retired = {each["started"]: each["t"] for each in events if each["event"] == "step"}
        for event in events:
            if event["event"] == "request":
                of_gateway = ("arrived", "admitted", "routed", "first_token")
                names = ("arrived", "gateway admitted", "routed", "first at gateway")
                for name, field in zip(names, of_gateway, strict=True):
                    if event[field] is not None:
                        found[event["request_id"]][name] = event[field]
            elif event.get("key", "").endswith("/0#1"):
                moments = found[event["key"].partition("/")[0]]
                moments |= _of_decode(event) if is_decode else _of_prefill(event, moments, retired)
    return found


def _of_prefill(
    event: Mapping[str, Any], before: Mapping[str, float], retired: Mapping[float, float]
) -> dict[str, float]:
    """`retired`: when a step's result was there, by when it was launched."""
    match event["event"]:
        case "received":
            return {"received": event["t"]}
        case "admitted":
            return {"worker admitted": event["t"]}
        case "first token sent":
            return {"sent": event["t"]}
        case "chunk":
            first = before.get("launched", event["started"])
            return {"launched": first, "computed": retired[event["started"]]}
        case "announced" if event["computed"]:
            return {"announced": event["t"]}
    return {}


def _of_decode(event: Mapping[str, Any]) -> dict[str, float]:
    match event["event"]:
        case "pulled":
            return {"pulled": event["finished"]}
        case "joined":
            return {"joined": event["t"]}
    return {}


def _stages(
    asked: Sequence[Asked], moments: Mapping[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Stage → median and least milliseconds."""
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for each in asked:
        own = moments[each.request_id] | {"asked": each.asked_s}
        own |= {"first token": each.came_s[0], "second token": each.came_s[1]}
        ways = [name for name in ("asked", *STAGES) if name in own]
        to_first = [name for name in ways if name not in _HANDED_OVER or name == "computed"]
        for before, after in pairwise(to_first):
            spent[after].append(own[after] - own[before])
        for before, after in pairwise([name for name in ways if name in _HANDED_OVER]):
            spent[after].append(own[after] - own[before])
        spent["TTFT"].append(own["first token"] - own["asked"])
        in_steps = own["computed"] - own["launched"]
        spent["TTFT but for steps"].append(spent["TTFT"][-1] - in_steps)
    return {
        name: {"median_ms": 1e3 * statistics.median(times), "least_ms": 1e3 * min(times)}
        for name in (*STAGES, "TTFT", "TTFT but for steps")
        if (times := spent.get(name))
    }


def _print(row: Mapping[str, Any]) -> None:
    print(
        f"\n{row['arrangement']}, prompts of {row['prompt_tokens']} tokens, {row['kind']}, "
        f"{row['streams']} at once: ms, median and least"
    )
    for name, times in row["stages"].items():
        shown = STAGES.get(name, name)
        print(f"  {shown:<50}{times['median_ms']:8.2f}{times['least_ms']:8.2f}", flush=True)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stack.stages", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--arrangement", nargs="+", choices=_COUNTS, default=list(_COUNTS))
    add("--prompts", type=int, nargs="+", default=[16, 512, 8192])
    add("--kinds", nargs="+", choices=("cold", "hit"), default=["cold", "hit"])
    add("--streams", type=int, nargs="+", default=[1, 8])
    add("--reps", type=int, default=20)
    add("--pause", type=float, default=0.05, help="seconds between requests")
    add("--output", type=Path, default=RESULTS / "stages.json")
    add_stack_flags(parser, device="cpu")
    parser.set_defaults(shape="tiny")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
