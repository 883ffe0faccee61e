"""Minutes of mixed requests, cancels and a killed worker; then: is everything as it was before?

    python -m benchmarks.stack.soak --minutes 7 --streams 64 --gpus 0,1

Each stream asks again as soon as it has its answer: prompts and answers of mixed lengths, a third
of the prompts with a beginning that others have too, half greedy, a tenth cancelled at a random
moment, some greedy ones asked a second time. In the middle one worker is killed; the launcher
starts it again. At the end every block must be free or cached, no claim left, the ledger empty, no
client may have seen an error, and memory must not have grown. Exit code 1 when any of it fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from baton.loadtest.drivers import request_of
from baton.loadtest.environment import describe_environment
from baton.services.launcher.roles import RoleCounts, StackConfig
from baton.shared.interrupt import exit_code
from baton.shared.model_files.info import load_model_info
from baton.shared.model_files.named import model_dir
from baton.shared.rpc.serve import internal_channel
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc as pb_grpc
from benchmarks.checkout import RESULTS, set_import_path
from benchmarks.stack.aftermath import MemoryWatch, leftovers
from benchmarks.stack.launched import (
    BenchmarkStack,
    StackFailed,
    StackOptions,
    running,
)
from models.dummy_model import SHAPES, given_or_dummy

_NUM_PREFIXES = 8
_SHARING = 1 / 3
_CANCELLED = 0.1
_REPEATED = 0.05
_NUM_KEPT_ANSWERS = 64
_CANCEL_S = (0.002, 2.0)
_DRAIN_S = 120.0
_RESTART_S = 240.0
_SAMPLE_S = 10.0
_SHAPE_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""On a CPU torch keeps what it prepared for each shape that it saw, up to 1,024 of them, some
hundred MiB: memory would grow for long before it stays. This bounds how many."""


@dataclass
class Seen:
    """What the clients saw."""

    num_answers: int = 0
    num_cancelled: int = 0
    num_tokens: int = 0
    num_retried: int = 0
    """Answers that took more than one attempt."""
    num_repeated: int = 0
    num_equal: int = 0
    """Of the repeated ones, those that were token by token the same."""
    errors: Counter[str] = field(default_factory=Counter)


class Clients:
    """`num_streams` of them, each with one request under way, until `stop`."""

    def __init__(self, address: str, args: argparse.Namespace, vocab_size: int) -> None:
        self.seen = Seen()
        self._args = args
        self._ids = range(vocab_size)
        self._draw = random.Random(args.seed)
        self._prefixes = [self._tokens(args.max_prompt // 2) for _ in range(_NUM_PREFIXES)]
        self._answered: deque[tuple[pb.GenerateRequest, list[int]]] = deque(
            maxlen=_NUM_KEPT_ANSWERS
        )
        self._channel = internal_channel(address)
        self._stub = pb_grpc.InferenceServiceStub(self._channel)
        self._is_stopping = False
        self._tasks = [asyncio.create_task(self._stream()) for _ in range(args.streams)]

    async def stop(self) -> None:
        """Every request that is under way ends first; what does not is an error."""
        self._is_stopping = True
        _, stuck = await asyncio.wait(self._tasks, timeout=_DRAIN_S)
        for task in stuck:
            self.seen.errors[f"no end within {_DRAIN_S:g} s"] += 1
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                self.seen.errors[f"the client itself: {result!r}"] += 1
        await self._channel.close()

    async def _stream(self) -> None:
        while not self._is_stopping:
            if self._answered and self._draw.random() < _REPEATED:
                request, before = self._draw.choice(self._answered)
                answer = await self._ask(request)
                if answer is not None:
                    self.seen.num_repeated += 1
                    self.seen.num_equal += answer == before
                continue
            request = self._request()
            if self._draw.random() < _CANCELLED:
                await self._ask(request, self._log_uniform(*_CANCEL_S))
                continue
            answer = await self._ask(request)
            if answer is not None and not request.sampling.temperature:
                self._answered.append((request, answer))

    async def _ask(
        self, request: pb.GenerateRequest, cancel_after_s: float | None = None
    ) -> list[int] | None:
        """The tokens; None when it was cancelled, or an error noted."""
        token_ids: list[int] = []
        seen, num_attempts = self.seen, 0
        call = self._stub.Generate(request)
        try:
            async with asyncio.timeout(cancel_after_s):
                async for response in call:
                    if response.HasField("chunk"):
                        if response.chunk.first_index != len(token_ids):
                            seen.errors["a chunk that does not follow the one before"] += 1
                        token_ids += response.chunk.token_ids
                    elif response.HasField("finished"):
                        num_attempts = response.finished.num_attempts
        except TimeoutError:
            seen.num_cancelled += 1
            return None
        except grpc.aio.AioRpcError as error:
            seen.errors[f"{error.code().name}: {error.details()}"] += 1
            return None
        finally:
            call.cancel()
            seen.num_tokens += len(token_ids)
        if not num_attempts or len(token_ids) != request.sampling.max_tokens:
            seen.errors["an answer of another length than asked"] += 1
            return None
        seen.num_answers += 1
        seen.num_retried += num_attempts > 1
        return token_ids

    def _request(self) -> pb.GenerateRequest:
        draw = self._draw
        num_tokens = round(self._log_uniform(16, self._args.max_prompt))
        prompt = self._tokens(num_tokens)
        if draw.random() < _SHARING:
            shared = draw.choice(self._prefixes)[: draw.randint(0, num_tokens)]
            prompt[: len(shared)] = shared
        sampling: dict[str, Any] = {}
        if draw.random() < 0.5:
            sampling = {"temperature": 0.8, "top_p": 0.95, "seed": draw.getrandbits(32)}
        return request_of(prompt, round(self._log_uniform(1, self._args.max_output)), **sampling)

    def _tokens(self, num_tokens: int) -> list[int]:
        return self._draw.choices(self._ids, k=num_tokens)

    def _log_uniform(self, low: float, high: float) -> float:
        """Short ones as often as long ones."""
        return float(low * (high / low) ** self._draw.random())


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    set_import_path()
    for name in _SHAPE_CACHES:
        os.environ.setdefault(name, "16")
    try:
        with given_or_dummy(args.model, args.shape) as model_dir:
            result = asyncio.run(_soak(args, model_dir))
    except StackFailed as error:
        print(error, file=sys.stderr)
        return 1
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    for name, problem in result["conditions"].items():
        print(f"{'FAIL' if problem else 'ok':4}  {name}{f': {problem}' if problem else ''}")
    print(f"written to {args.output}")
    return int(any(result["conditions"].values()))


async def _soak(args: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    environment = describe_environment()
    async with running(_options(args, model_dir)) as stack:
        victim = args.kill or stack.workers[-1].spec.name
        if victim not in stack.pids():
            raise StackFailed(f"--kill {victim}: no such worker")
        memory = MemoryWatch(stack)
        clients = Clients(stack.address, args, load_model_info(model_dir).vocab_size)
        duration_s = 60 * args.minutes
        started_s = time.monotonic()
        killing = asyncio.create_task(_kill_and_wait(stack, victim, duration_s / 2))
        while (left_s := started_s + duration_s - time.monotonic()) > 0:
            await asyncio.sleep(min(_SAMPLE_S, duration_s / 8, left_s))
            memory.look()
            print(_progress(time.monotonic() - started_s, clients.seen, memory), flush=True)
        restart_s = await killing
        await clients.stop()
        memory.look()
        left = await leftovers(stack)
    seen = clients.seen
    others = [line for line in stack.deaths if victim not in line]
    equal = f"{seen.num_repeated - seen.num_equal} of {seen.num_repeated} repeated answers differ"
    differ = args.check_answers and seen.num_equal != seen.num_repeated
    return {
        "conditions": {
            "no error at a client": str(dict(seen.errors)) if seen.errors else "",
            "answers came": "" if seen.num_answers else "none",
            "the killed worker came back": "" if restart_s else f"not within {_RESTART_S:g} s",
            "nobody else died": "; ".join(others),
            "repeated greedy answers are equal": equal if differ else "",
            **left,
            "memory is flat": memory.growth(),
        },
        "seen": {**vars(seen), "errors": dict(seen.errors)},
        "answers_checked": args.check_answers,
        "killed": victim,
        "restart_s": restart_s,
        "memory_mib": memory.summary(),
        # Without paths, which are those of one machine.
        "flags": {n: str(v) for n, v in vars(args).items() if not isinstance(v, Path)},
        "environment": environment,
    }


async def _kill_and_wait(stack: BenchmarkStack, victim: str, after_s: float) -> float | None:
    """Seconds until it served again; None when it did not."""
    await asyncio.sleep(after_s)
    before, killed_s = stack.worker_address(victim), time.monotonic()
    os.kill(stack.pids()[victim], signal.SIGKILL)
    while time.monotonic() - killed_s < _RESTART_S:
        await asyncio.sleep(0.1)
        if stack.worker_address(victim) not in (None, before):
            return round(time.monotonic() - killed_s, 1)
    return None


def _progress(elapsed_s: float, seen: Seen, memory: MemoryWatch) -> str:
    sizes = " ".join(f"{name} {size:.0f}" for name, size in memory.last().items())
    return (
        f"{elapsed_s:5.0f} s  {seen.num_answers} answers, {seen.num_tokens} tokens,"
        f" {seen.num_cancelled} cancelled, {seen.num_retried} retried,"
        f" {seen.errors.total()} errors; MiB: {sizes}"
    )


def _options(args: argparse.Namespace, model_dir: Path) -> StackOptions:
    config = StackConfig(
        model_dir=model_dir,
        counts=RoleCounts(args.prefill, args.decode, args.both),
        port=0,
        device=args.device,
        dtype=args.dtype,
        cluster=f"soak-{time.time_ns()}",
        num_blocks=args.num_blocks,
        max_model_len=args.max_prompt + args.max_output,
        drain_s=2.0,
    )
    workers = tuple(shlex.split(args.worker_flags))
    if args.model is None:
        workers = ("--load-format", "dummy", *workers)
    flags = dict.fromkeys(("prefill", "decode", "both"), workers)
    flags["gateway"] = tuple(shlex.split(args.gateway_flags))
    gpus = () if args.device == "cpu" else tuple(args.gpus.split(","))
    return StackOptions(config, gpus, flags, start_limit_s=args.start_limit, log=args.log)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stack.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--minutes", type=float, default=7.0)
    add("--streams", type=int, default=64)
    add("--max-prompt", type=int, default=4096, help="tokens; prompts have 16 to that many")
    add("--max-output", type=int, default=512, help="tokens; answers have 1 to that many")
    add("--prefill", type=int, default=1, help="workers of that role")
    add("--decode", type=int, default=1, help="workers of that role")
    add("--both", type=int, default=0, help="workers of that role")
    add("--kill", metavar="WORKER", help="who is killed; default: the last, decode-0")
    add("--check-answers", action="store_true", help="differing repeated answers fail (float32)")
    add("--gpus", default="0,1", help="by worker: prefill, decode, both")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--model", type=model_dir, help="default: a dummy of --shape")
    add("--shape", choices=SHAPES, default="llama-8b")
    add("--num-blocks", type=int, help="of each pool; default: the worker's")
    add("--worker-flags", default="", help="more flags for all workers")
    add("--gateway-flags", default="", help="more flags for the gateway")
    add("--start-limit", type=float, default=300.0, help="seconds until it must serve")
    add("--seed", type=int, default=0)
    add("--log", type=Path, help="write the roles' lines there")
    add("--output", type=Path, default=RESULTS / "soak.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
