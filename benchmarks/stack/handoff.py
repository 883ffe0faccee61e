"""What a hand-off costs between two processes: `python -m benchmarks.stack.handoff`.

    ceiling   one process copies the same bytes from device to device with torch
    read      the transport alone: random blocks by index, into random blocks
    pull      the same through the puller, without sums and with

Between two GPUs where there are two, on one GPU, or, where there is none, in the host's memory.
Blocks of 2 MiB are 16 tokens of an 8B model in bfloat16. Every read is of other blocks than the
one before, and what landed is checked. NIXL alone, measured earlier between two H200s of one host:
186 GB/s for 512 blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch

from baton.loadtest.environment import describe_environment
from baton.shared.kv.digest import Uint64Array, block_sums, digests, seeds
from baton.shared.model_files.named import model_dir
from baton.shared.transfer import puller as puller_module
from baton.shared.transfer.interface import BlockCopy, GroupBlocks, LocalPool, PeerConnection
from baton.shared.transfer.nixl import NixlTransport
from baton.shared.transfer.puller import ExpectedBlock, Puller, PullJob, PullResult, SumBlocks
from baton.v1.kv_service_pb2 import PoolDescription
from benchmarks.checkout import RESULTS, ROOT, set_import_path
from benchmarks.stack.handoff_served import measure_served
from models.dummy_model import SHAPES, given_or_dummy

NUM_HEADS = 8
GROUP = 0
"""The only cache group."""
RECORDED_GB_S = 186.0
"""NIXL 1.5.1 alone, READ of 512 random blocks of 2 MiB between two H200s."""


@dataclass
class Row:
    source: str
    destination: str
    num_blocks: int
    what: str
    gb_per_s: float
    """Median of the repetitions."""
    best_gb_per_s: float
    of_ceiling: float


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse_args(argv)
    if args.owner:
        _own(args.owner, args.pool_blocks, args.block_bytes)
        return
    if args.piece_mib:
        puller_module._DEVICE_PIECE_BYTES = args.piece_mib << 20
    environment = describe_environment() | _devices()
    rows: list[Row] = []
    connections = {}
    for source, destination in _places():
        with _owner(source, args) as (description, sums):
            bench = _Bench(destination, description, sums, args)
            try:
                connections[f"{source} to {destination}"] = bench.connect()
                for num_blocks in args.blocks:
                    rows += bench.measure(source, num_blocks)
            finally:
                bench.close()
    result = {
        "environment": environment,
        "block_bytes": args.block_bytes,
        "recorded_nixl_alone_gb_per_s": RECORDED_GB_S,
        "connect": connections,
        "transfer": [asdict(row) for row in rows],
        "served": _served(args) if args.prompts else [],
    }
    _print(rows, connections)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {args.output}")


def _served(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a client sees of it."""
    has_cuda = torch.cuda.is_available()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    visible = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    gpus = tuple((visible * 2)[:2]) if has_cuda else ()
    flags = ["--token-budget", "1024"]
    if torch.cuda.device_count() == 1:
        flags += ["--gpu-memory-utilization", "0.4"]
    shape = args.shape or ("llama-8b" if has_cuda else "tiny")
    with given_or_dummy(args.model, shape) as model_dir:
        return measure_served(
            model_dir,
            args.prompts,
            gpus=gpus,
            repetitions=args.reps,
            worker_flags=tuple(flags),
            load_format="dummy" if args.model is None else "auto",
        )


class _Bench:
    """The reader's side. `sums`: [pool blocks, heads], of the owner's blocks."""

    def __init__(
        self,
        device: str,
        description: PoolDescription,
        sums: Uint64Array,
        args: argparse.Namespace,
    ) -> None:
        self._device = torch.device(device)
        self._description = description
        self._sums = sums
        self._args = args
        incarnation = secrets.token_hex(16)
        self._group = GroupBlocks(0, args.pool_blocks, args.block_bytes, NUM_HEADS)
        memory = torch.zeros(self._group.end_bytes, dtype=torch.uint8, device=self._device)
        self._pool = LocalPool(memory, (self._group,), incarnation)
        self._transport = NixlTransport(incarnation)
        self._transport.bind(self._pool)
        self._connection: PeerConnection | None = None

    def connect(self) -> dict[str, float]:
        started_s = time.perf_counter()
        self._connection = self._transport.connect(self._description)
        return {
            "seconds": time.perf_counter() - started_s,
            "gb_per_s": self._connection.bytes_per_second / 1e9,
        }

    def measure(self, source: str, num_blocks: int) -> list[Row]:
        num_bytes = num_blocks * self._args.block_bytes
        ceiling = _copy_rates(source, self._device, num_bytes, self._args.reps)
        sums = _sums_of(self._pool)
        nothing = np.zeros((num_blocks, NUM_HEADS), dtype=np.uint64)
        measured = {
            "ceiling": ceiling,
            "read": self._read_rates(num_blocks),
            "pull without sums": self._pull_rates(
                num_blocks, lambda ids, group: nothing[: len(ids)], is_checked=False
            ),
            "pull with sums": self._pull_rates(num_blocks, sums, is_checked=True),
        }
        top = statistics.median(ceiling)
        return [
            Row(
                source,
                str(self._device),
                num_blocks,
                what,
                statistics.median(rates),
                max(rates),
                statistics.median(rates) / top,
            )
            for what, rates in measured.items()
        ]

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._transport.close()

    def _read_rates(self, num_blocks: int) -> list[float]:
        assert self._connection is not None
        rates = []
        for _ in range(self._args.reps):
            copies = self._copies(num_blocks)
            started_s = time.perf_counter()
            self._connection.read(GROUP, copies)
            rates.append(self._rate(num_blocks, time.perf_counter() - started_s))
            local = _sums_of(self._pool)([copy.local_block_id for copy in copies], GROUP)
            remote = self._sums[[copy.remote_block_id for copy in copies]]
            assert np.array_equal(local, remote), "what landed is not what was read"
        return rates

    def _pull_rates(self, num_blocks: int, sum_blocks: SumBlocks, is_checked: bool) -> list[float]:
        results: Queue[PullResult] = Queue()
        puller = Puller(self._transport, self._pool, results.put, sum_blocks)
        rates = []
        try:
            # The first makes the connection, and compiles what sums.
            for repetition in range(self._args.reps + 1):
                job = self._job(self._copies(num_blocks))
                started_s = time.perf_counter()
                puller.submit(job)
                result = results.get()
                elapsed_s = time.perf_counter() - started_s
                assert result.error is None, result.error
                assert not (is_checked and result.mismatched), "what landed is not what was read"
                if repetition:
                    rates.append(self._rate(num_blocks, elapsed_s))
        finally:
            puller.close()
        return rates

    def _copies(self, num_blocks: int) -> list[BlockCopy]:
        ids = range(self._args.pool_blocks)
        pairs = zip(random.sample(ids, num_blocks), random.sample(ids, num_blocks), strict=True)
        return [BlockCopy(remote, local) for remote, local in pairs]

    def _job(self, copies: list[BlockCopy]) -> PullJob:
        ids = [copy.remote_block_id for copy in copies]
        seed = seeds(self._description.incarnation, ids, [0] * len(ids), NUM_HEADS)
        rows = digests(self._sums[ids], seed).tolist()
        expected = [ExpectedBlock(i, 0, tuple(row)) for i, row in zip(ids, rows, strict=True)]
        return PullJob(0, self._description, GROUP, copies, expected)

    def _rate(self, num_blocks: int, elapsed_s: float) -> float:
        return num_blocks * self._group.block_bytes / elapsed_s / 1e9


def _sums_of(pool: LocalPool) -> SumBlocks:
    """Sums as a worker makes them: by a kernel on a GPU, with torch elsewhere."""
    words = pool.words(GROUP)
    if not pool.memory.is_cuda:
        return lambda ids, group: block_sums(words[list(ids)])

    from baton.kernels import block_digest

    def sums(ids: Sequence[int], group: int) -> Uint64Array:
        on_device = torch.tensor(ids, dtype=torch.int32).to(words.device)
        found: Uint64Array = block_digest.block_sums(words, on_device).cpu().numpy()
        return found.view(np.uint64)

    return sums


def _copy_rates(source: str, destination: torch.device, num_bytes: int, reps: int) -> list[float]:
    """GB/s of torch's copy, in one process."""
    here = torch.ones(num_bytes, dtype=torch.uint8, device=source)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=destination)
    rates = []
    for repetition in range(reps + 1):
        _synchronize()
        started_s = time.perf_counter()
        there.copy_(here)
        _synchronize()
        if repetition:
            rates.append(num_bytes / (time.perf_counter() - started_s) / 1e9)
    return rates


def _synchronize() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def _own(device: str, num_blocks: int, block_bytes: int) -> None:
    """The other process: prints its pool's description and sums, and lives until stdin ends."""
    group = GroupBlocks(0, num_blocks, block_bytes, NUM_HEADS)
    memory = torch.empty(group.end_bytes, dtype=torch.uint8, device=device)
    memory.random_(0, 256)
    incarnation = secrets.token_hex(16)
    pool = LocalPool(memory, (group,), incarnation)
    words = pool.words(GROUP)
    # A few at once: torch makes long integers of all words.
    parts = [block_sums(words[start : start + 16]) for start in range(0, num_blocks, 16)]
    sums = np.concatenate(parts)
    transport = NixlTransport(incarnation)
    transport.bind(pool)
    print(transport.describe().SerializeToString().hex(), sums.tobytes().hex(), flush=True)
    sys.stdin.read()
    transport.close()


@contextmanager
def _owner(device: str, args: argparse.Namespace) -> Iterator[tuple[PoolDescription, Uint64Array]]:
    command = [sys.executable, "-m", "benchmarks.stack.handoff", "--owner", device]
    command += ["--pool-blocks", str(args.pool_blocks), "--block-bytes", str(args.block_bytes)]
    set_import_path()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            description, _, sums = process.stdout.readline().strip().partition(" ")
            if not sums:
                raise RuntimeError(f"the owner on {device} did not start")
            yield (
                PoolDescription.FromString(bytes.fromhex(description)),
                np.frombuffer(bytes.fromhex(sums), dtype=np.uint64).reshape(-1, NUM_HEADS),
            )
        finally:
            process.stdin.close()


def _places() -> list[tuple[str, str]]:
    """Pairs of source and destination."""
    if not torch.cuda.is_available():
        return [("cpu", "cpu")]
    pairs = [("cuda:0", "cuda:0")]
    return pairs + [("cuda:0", "cuda:1")] if torch.cuda.device_count() > 1 else pairs


def _devices() -> dict[str, str]:
    count = torch.cuda.device_count()
    return {f"cuda:{index}": torch.cuda.get_device_name(index) for index in range(count)}


def _print(rows: Sequence[Row], connections: dict[str, dict[str, float]]) -> None:
    for pair, found in connections.items():
        print(f"{pair}: connected in {found['seconds']:.2f} s")
    print(f"{'from':<8}{'to':<8}{'blocks':>7}  {'what':<20}{'GB/s':>8}{'best':>8}{'ceiling':>9}")
    for row in rows:
        print(
            f"{row.source:<8}{row.destination:<8}{row.num_blocks:>7}  {row.what:<20}"
            f"{row.gb_per_s:>8.1f}{row.best_gb_per_s:>8.1f}{row.of_ceiling:>8.0%}"
        )
    print(f"NIXL alone between two H200s, recorded: {RECORDED_GB_S:.0f} GB/s")


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stack.handoff", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 512], help="blocks a read")
    parser.add_argument("--pool-blocks", type=int, default=1024, help="size of both pools")
    parser.add_argument("--block-bytes", type=int, default=2 << 20)
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--piece-mib", type=int, help="what the puller reads at once")
    parser.add_argument("--output", type=Path, default=RESULTS / "handoff.json")
    parser.add_argument(
        "--prompts", type=int, nargs="*", default=[1024, 8192], help="prompt lengths when served"
    )
    parser.add_argument("--model", type=model_dir, help="served; default: a dummy")
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="of the dummy; default: llama-8b, tiny on a CPU"
    )
    parser.add_argument("--owner", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
