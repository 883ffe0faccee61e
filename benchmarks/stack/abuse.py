"""What clients that misbehave cost the others: latency of one client's requests, quiet and under
each abuse, in one run, against a stack of its own.

    python -m benchmarks.stack.abuse --output abuse.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from baton.loadtest.environment import describe_environment
from baton.services.launcher.roles import RoleCounts, StackConfig
from baton.shared.interrupt import exit_code
from baton.shared.model_files.named import model_dir
from benchmarks.checkout import DEMO_MODEL
from benchmarks.stack.launched import StackFailed, StackOptions, private_mib, running

_COMPLETIONS = "/v1/completions"
_MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    abuse: str
    num_requests: int
    num_failed: int
    p50_ms: float
    p99_ms: float
    longest_ms: float
    num_abuses: int
    gateway_mib: float
    """Most private memory seen."""


async def malformed(address: str) -> None:
    await send(address, post(b'{"prompt": '))


async def nested(address: str) -> None:
    await send(address, post(b'{"prompt": ' + b"[" * 2 * _MIB))


async def giant_headers(address: str) -> None:
    await send(address, b"GET /health HTTP/1.1\r\nhost: b\r\nx: " + b"a" * _MIB)


async def prompt_of_10_mib(address: str) -> None:
    await send(address, post(json.dumps({"prompt": "a" * 10 * _MIB}).encode()))


async def many_tokens(address: str) -> None:
    """As much to parse as a body may hold."""
    await send(address, post(json.dumps({"prompt": [10_000] * 550_000}).encode()))


async def many_messages(address: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}] * 100_000}
    await send(address, post(json.dumps(body).encode(), "/v1/chat/completions"))


async def slow_readers(address: str) -> None:
    """Eight that ask much and read nothing, for a second."""
    body = {"prompt": "In the beginning", "max_tokens": 500, "ignore_eos": True, "stream": True}
    writers = []
    for _ in range(8):
        _, writer = await connect(address)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(post(json.dumps(body).encode()))
        writers.append(writer)
    await asyncio.sleep(1)
    for writer in writers:
        writer.transport.abort()


async def half_open(address: str) -> None:
    """Two hundred that say half of what they want, for a second."""
    writers = [(await connect(address))[1] for _ in range(200)]
    for writer in writers:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: b\r\ncontent-length: 99\r\n\r\n{")
    await asyncio.sleep(1)
    for writer in writers:
        writer.transport.abort()


ABUSES: tuple[Callable[[str], Awaitable[None]], ...] = (
    malformed,
    nested,
    giant_headers,
    prompt_of_10_mib,
    many_tokens,
    many_messages,
    slow_readers,
    half_open,
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stack.abuse", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=model_dir, default=DEMO_MODEL)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each abuse")
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    args = parser.parse_args()
    try:
        rows = asyncio.run(measure(args.model, args.seconds))
    except StackFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(table(rows))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": describe_environment(), "rows": [asdict(row) for row in rows]}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


async def measure(model: Path, seconds: float) -> list[Row]:
    config = StackConfig(
        model_dir=model, counts=RoleCounts(1, 1, 0), port=0, http_port=0, dtype="float32"
    )
    async with running(StackOptions(config)) as stack:
        address = stack.http_address
        assert address is not None
        await asyncio.gather(*(one_request(address) for _ in range(4)))
        pid = stack.pids()["gateway"]
        rows = [await under(None, address, seconds, pid)]
        for abuse in ABUSES:
            rows.append(await under(abuse, address, seconds, pid))
            print(f"  {rows[-1].abuse}", file=sys.stderr, flush=True)
        return rows


async def under(
    abuse: Callable[[str], Awaitable[None]] | None, address: str, seconds: float, pid: int
) -> Row:
    """One client asks again and again while another misbehaves."""
    num_abuses = 0

    async def keep_abusing() -> None:
        nonlocal num_abuses
        while abuse is not None:
            # Some are cut off before they have said everything.
            with suppress(ConnectionError):
                await abuse(address)
            num_abuses += 1

    abusing = asyncio.create_task(keep_abusing())
    latencies: list[float] = []
    num_failed, most_mib = 0, 0.0
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            started = time.monotonic()
            num_failed += not await one_request(address)
            latencies.append((time.monotonic() - started) * 1e3)
            most_mib = max(most_mib, private_mib(pid))
    finally:
        abusing.cancel()
        await asyncio.gather(abusing, return_exceptions=True)
    latencies.sort()
    return Row(
        abuse=abuse.__name__.replace("_", " ") if abuse is not None else "quiet",
        num_requests=len(latencies),
        num_failed=num_failed,
        p50_ms=statistics.median(latencies),
        p99_ms=latencies[int(0.99 * (len(latencies) - 1))],
        longest_ms=latencies[-1],
        num_abuses=num_abuses,
        gateway_mib=most_mib,
    )


async def one_request(address: str) -> bool:
    """Eight tokens, whole; whether they came."""
    body = {"prompt": "In the beginning", "temperature": 0, "max_tokens": 8}
    reply = await send(address, post(json.dumps(body).encode()))
    return reply.startswith(b"HTTP/1.1 200 ")


def post(body: bytes, path: str = _COMPLETIONS) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: b\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def send(address: str, data: bytes) -> bytes:
    """Everything that comes back until the server closes."""
    reader, writer = await connect(address)
    try:
        writer.write(data)
        return await reader.read()
    finally:
        writer.transport.abort()


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


def table(rows: list[Row]) -> str:
    head = f"{'abuse':<18} {'requests':>8} {'failed':>6} {'p50 ms':>7} {'p99 ms':>7} {'max ms':>7}"
    lines = [f"{head} {'abuses':>7} {'gateway MiB':>11}"]
    for row in rows:
        lines.append(
            f"{row.abuse:<18} {row.num_requests:>8} {row.num_failed:>6} {row.p50_ms:>7.1f} "
            f"{row.p99_ms:>7.1f} {row.longest_ms:>7.1f} {row.num_abuses:>7} "
            f"{row.gateway_mib:>11.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
