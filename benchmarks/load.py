"""Requests at a rate, or from so many clients at once, and what each of them saw.

    python -m benchmarks.load --target HOST:PORT --rate 10 --duration 22 --prompt-tokens 2048

Each generator is a process of its own. Prompts are random token ids, made before the first one is
sent; arrivals are Poisson, and times count from the planned arrival, so that a generator that
falls behind makes the figures worse, never better. It says so then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import uvloop
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc as pb_grpc
from baton.v1 import types_pb2

from benchmarks.samples import Offered, Sample, summarise, warnings

ROOT = Path(__file__).parents[1]
_LINE_BYTES = 1 << 28
_OTHER_SEED = 999_999


@dataclass(frozen=True)
class Load:
    """What is offered: `rate` requests a second for `duration_s`, or, with `rate` None,
    `num_requests` from `num_streams` clients that each wait for their answer."""

    target: str
    prompt_tokens: int
    output_tokens: int
    rate: float | None = None
    duration_s: float = 22.0
    num_streams: int = 1
    num_requests: int = 1
    drain_s: float = 30.0
    """After the last arrival; what is not finished then is given up."""
    vocab_size: int = 4096
    seed: int = 0

    def at(self, rate: float, *, seed: int) -> Load:
        return replace(self, rate=rate, seed=seed)

    def in_turn(self, num_requests: int, *, num_streams: int, output_tokens: int) -> Load:
        """A closed loop of other requests than any at a rate."""
        return replace(
            self,
            rate=None,
            num_requests=num_requests,
            num_streams=num_streams,
            output_tokens=output_tokens,
            seed=_OTHER_SEED,
        )


def request_of(prompt: Sequence[int], max_tokens: int, **sampling: Any) -> pb.GenerateRequest:
    """Greedy, and as long as asked, unless `sampling` says otherwise."""
    fields: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(token_ids=prompt),
        sampling=types_pb2.SamplingParams(max_tokens=max_tokens, **fields),
    )


async def ask(
    stub: pb_grpc.InferenceServiceAsyncStub,
    request: pb.GenerateRequest,
    sample: Sample,
    started_s: float,
    token_ids: list[int] | None = None,
) -> None:
    """Follows one answer into `sample`, and into `token_ids`; `sample.at_s` after `started_s`."""
    arrival_s = started_s + sample.at_s
    last_s = arrival_s
    sample.late_s = time.monotonic() - arrival_s
    try:
        async for response in stub.Generate(request):
            now = time.monotonic()
            if response.HasField("chunk"):
                if sample.ttft_s is None:
                    sample.ttft_s = now - arrival_s
                else:
                    sample.longest_gap_s = max(sample.longest_gap_s, now - last_s)
                last_s = now
                sample.e2e_s = now - arrival_s
                sample.num_tokens += len(response.chunk.token_ids)
                if token_ids is not None:
                    token_ids += response.chunk.token_ids
            elif response.HasField("finished"):
                sample.is_local = not response.finished.prefill_worker_id
                sample.num_attempts = response.finished.num_attempts
                sample.status = "OK"
    except grpc.aio.AioRpcError as error:
        sample.status = f"{error.code().name}: {error.details()}"


async def run_load(load: Load, num_processes: int = 1) -> Offered:
    """Offers `load` from that many processes. Raises RuntimeError when one of them fails."""
    shards = [_Shard(part) for part in split(load, num_processes)]
    try:
        await asyncio.gather(*(shard.prepare() for shard in shards))
        results = await asyncio.gather(*(shard.run() for shard in shards))
    finally:
        await asyncio.gather(*(shard.close() for shard in shards))
    samples = [Sample(**fields) for result in results for fields in result["samples"]]
    samples.sort(key=lambda sample: sample.at_s)
    return Offered(samples, max(result["cpu"] for result in results))


def split(load: Load, num_processes: int) -> list[Load]:
    """Shares that together are `load`; sums of Poisson arrivals are Poisson."""
    rate = None if load.rate is None else load.rate / num_processes
    return [
        replace(
            load,
            rate=rate,
            num_streams=-(-load.num_streams // num_processes),
            num_requests=(load.num_requests + number) // num_processes,
            seed=load.seed * 1000 + number,
        )
        for number in range(num_processes)
    ]


class _Shard:
    """One generator's process: it gets its load, says when it is prepared, and is told to go."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._process: asyncio.subprocess.Process | None = None

    async def prepare(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.load", "--shard"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
            cwd=ROOT,
        )
        self._say(json.dumps(asdict(self._load)))
        await self._hear()

    async def run(self) -> dict[str, Any]:
        self._say("go")
        result: dict[str, Any] = await self._hear()
        return result

    async def close(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def _say(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    async def _hear(self) -> Any:
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("a load generator ended early")
        return json.loads(line)


def _shard_main() -> None:
    """Standard input: the load, then a line to go. Standard output: a line when prepared, then
    the result."""
    load = Load(**json.loads(sys.stdin.readline()))
    requests, arrivals = plan(load)

    async def offer() -> list[Sample]:
        async with grpc.aio.insecure_channel(
            load.target, options=[("grpc.enable_http_proxy", 0)]
        ) as channel:
            await channel.channel_ready()
            print(json.dumps("ready"), flush=True)
            sys.stdin.readline()
            stub = pb_grpc.InferenceServiceStub(channel)
            if load.rate is None:
                return await _closed_loop(stub, load, requests)
            return await _open_loop(stub, load, requests, arrivals)

    cpu_before_s, before_s = time.process_time(), time.monotonic()
    samples = uvloop.run(offer())
    cpu = (time.process_time() - cpu_before_s) / (time.monotonic() - before_s)
    print(json.dumps({"samples": [asdict(sample) for sample in samples], "cpu": cpu}), flush=True)


def plan(load: Load) -> tuple[list[pb.GenerateRequest], list[float]]:
    """Requests and, at a rate, their arrivals in seconds from the start; a function of `seed`."""
    draw = random.Random(load.seed)
    arrivals: list[float] = []
    num_requests = load.num_requests
    if load.rate is not None:
        at_s = draw.expovariate(load.rate)
        while at_s < load.duration_s:
            arrivals.append(at_s)
            at_s += draw.expovariate(load.rate)
        num_requests = len(arrivals)
    ids = range(load.vocab_size)
    requests = [
        request_of(draw.choices(ids, k=load.prompt_tokens), load.output_tokens)
        for _ in range(num_requests)
    ]
    return requests, arrivals


async def _open_loop(
    stub: pb_grpc.InferenceServiceAsyncStub,
    load: Load,
    requests: Sequence[pb.GenerateRequest],
    arrivals: Sequence[float],
) -> list[Sample]:
    samples = [Sample(at_s) for at_s in arrivals]
    tasks = []
    started_s = time.monotonic()
    for request, sample in zip(requests, samples, strict=True):
        await asyncio.sleep(max(0.0, started_s + sample.at_s - time.monotonic()))
        tasks.append(asyncio.create_task(ask(stub, request, sample, started_s)))
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=load.drain_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return samples


async def _closed_loop(
    stub: pb_grpc.InferenceServiceAsyncStub, load: Load, requests: Sequence[pb.GenerateRequest]
) -> list[Sample]:
    samples: list[Sample] = []
    started_s = time.monotonic()
    left = list(requests)

    async def client() -> None:
        while left:
            sample = Sample(time.monotonic() - started_s)
            samples.append(sample)
            await ask(stub, left.pop(), sample, started_s)

    await asyncio.gather(*(client() for _ in range(load.num_streams)))
    return samples


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--target", default="127.0.0.1:50051", help="the gateway")
    parser.add_argument("--rate", type=float, help="requests a second; default: a closed loop")
    parser.add_argument("--duration", type=float, default=22.0, help="seconds, at a rate")
    parser.add_argument("--streams", type=int, default=1, help="clients of a closed loop")
    parser.add_argument("--requests", type=int, default=16, help="of a closed loop, in all")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=4096, help="prompts draw from it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=1, help="generator processes")
    args = parser.parse_args(argv)
    if args.shard:
        _shard_main()
        return
    load = Load(
        target=args.target,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        rate=args.rate,
        duration_s=args.duration,
        num_streams=args.streams,
        num_requests=args.requests,
        vocab_size=args.vocab_size,
        seed=args.seed,
    )
    summary = summarise(asyncio.run(run_load(load, args.clients)), [(1.0, 0.01), (1.0, 0.025)])
    print(json.dumps(summary, indent=2))
    for line in warnings(summary):
        print(f"WARNING: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
