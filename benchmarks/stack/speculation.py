"""What guessing brings: `python -m benchmarks.stack.speculation [--speculate KIND:K]`.

One `baton up` with a worker that speculates; each prompt is asked with and without it, turn about,
so that both meet the same machine. Texts that copy: a passage to be repeated; one that does not: a
sampled story. Ends with 1 when an answer with guesses is not the answer without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from baton.loadtest.environment import describe_environment
from baton.services.launcher.roles import RoleCounts, StackConfig
from baton.shared.interrupt import exit_code
from baton.shared.model_files.named import model_dir
from baton.shared.rpc.serve import internal_channel
from baton.shared.speculation import (
    DRAFT_MODEL_HELP,
    HELP,
    METAVAR,
    Speculation,
    speculation,
)
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc, types_pb2
from benchmarks.checkout import DEMO_MODEL
from benchmarks.stack.launched import StackOptions, running

_PASSAGE = (
    "And the king of the south shall be moved with anger, and shall come forth and fight with "
    "him. He set forth a great multitude of horses, of wagons and of men, and went from the river "
    "to the hills, and rested there for seven days and seven nights, and they ate bread and fish. "
)
_STORY = "Once there was a man who had two sons and no land of his own, and"


@dataclass
class Row:
    """Tokens per second after the first token, medians over rounds."""

    text: str
    num_streams: int
    num_tokens: int
    plain: float
    speculating: float
    ratio: float
    accepted_per_draft: float


@dataclass(frozen=True)
class Case:
    text: str
    prompt: str
    sampling: types_pb2.SamplingParams


def cases(num_tokens: int) -> list[Case]:
    greedy = types_pb2.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    drawn = types_pb2.SamplingParams(
        temperature=1.0, seed=11, max_tokens=num_tokens, ignore_eos=True
    )
    return [
        Case("copied, greedy", 3 * _PASSAGE + _PASSAGE[:40], greedy),
        Case("story, drawn", _STORY, drawn),
    ]


async def measure(
    address: str, num_tokens: int, num_rounds: int, streams: Sequence[int]
) -> tuple[list[Row], bool]:
    rows, are_equal = [], True
    async with internal_channel(address) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        for case in cases(num_tokens):
            for num_streams in streams:
                row, is_equal = await _measured(stub, case, num_streams, num_rounds)
                rows.append(row)
                are_equal &= is_equal
                print(json.dumps(asdict(row)), flush=True)
    return rows, are_equal


async def _measured(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub,
    case: Case,
    num_streams: int,
    num_rounds: int,
) -> tuple[Row, bool]:
    rates: dict[bool, list[float]] = {False: [], True: []}
    answers: dict[bool, list[list[int]]] = {}
    before = await _drafts(stub)
    for turn in range(num_rounds + 1):
        for speculates in (False, True):
            streams = [_stream(stub, case, speculates) for _ in range(num_streams)]
            told = await asyncio.gather(*streams)
            answers[speculates] = [token_ids for token_ids, _ in told]
            # The first turn warms up: prefix cache, and what steps cost.
            if turn:
                rates[speculates].append(sum(rate for _, rate in told))
    after = await _drafts(stub)
    plain, fast = median(rates[False]), median(rates[True])
    num_drafts = after[0] - before[0]
    accepted = (after[1] - before[1]) / num_drafts if num_drafts else 0.0
    num_tokens = case.sampling.max_tokens
    row = Row(case.text, num_streams, num_tokens, plain, fast, fast / plain, accepted)
    return row, answers[False] == answers[True]


async def _stream(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub, case: Case, speculates: bool
) -> tuple[list[int], float]:
    """Its tokens, and how many came in a second after the first."""
    sampling = types_pb2.SamplingParams(speculate=speculates)
    sampling.MergeFrom(case.sampling)
    token_ids: list[int] = []
    first_at = last_at = 0.0
    num_first = 0
    async for response in stub.Generate(pb.GenerateRequest(text=case.prompt, sampling=sampling)):
        if response.HasField("chunk"):
            token_ids += response.chunk.token_ids
            last_at = time.perf_counter()
            if not first_at:
                first_at, num_first = last_at, len(token_ids)
    return token_ids, (len(token_ids) - num_first) / (last_at - first_at)


async def _drafts(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub,
) -> tuple[int, int]:
    """Chains that were checked, and tokens of them that were accepted; workers tell twice a second
    or so."""
    await asyncio.sleep(1.5)
    counters = (await stub.GetServerInfo(pb.GetServerInfoRequest())).counters
    return counters.num_drafts, counters.num_accepted_tokens


async def run(args: argparse.Namespace) -> int:
    environment = describe_environment()
    config = StackConfig(
        model_dir=args.model,
        counts=RoleCounts(prefill=0, decode=0, both=1),
        port=0,
        device=args.device,
        speculate=args.speculate,
        draft_model_dir=args.draft_model,
    )
    async with running(StackOptions(config)) as stack:
        rows, are_equal = await measure(stack.address, args.tokens, args.rounds, args.streams)
    result = {
        "environment": environment,
        "model": args.model.name,
        "speculate": str(args.speculate),
        "draft_model": None if args.draft_model is None else args.draft_model.name,
        "num_rounds": args.rounds,
        "are_equal": are_equal,
        "rows": [asdict(row) for row in rows],
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print("answers are equal" if are_equal else "ANSWERS DIFFER")
    return 0 if are_equal else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=model_dir, default=DEMO_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--speculate", type=speculation, default=Speculation("ngram"), metavar=METAVAR, help=HELP
    )
    parser.add_argument("--draft-model", type=model_dir, metavar="DIR", help=DRAFT_MODEL_HELP)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    return asyncio.run(run(args))


if __name__ == "__main__":
    sys.exit(exit_code(main))
