"""What the generator itself can drive: closed loops against null servers, with processes as in a
load test, and one server for each generator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from baton.loadtest.null_server import MODEL
from baton.loadtest.run import own_module, run_load
from baton.loadtest.samples import OK, Offered
from baton.loadtest.spec import Load

_STREAMS = 32
_DURATION_S = 4.0


@dataclass(frozen=True)
class Capacity:
    """What the generator processes did together; `cpu` counts the cores that they used."""

    scheme: str
    output_tokens: int
    requests_per_s: float
    tokens_per_s: float
    cpu: float
    cpu_us_per_token: float

    @property
    def tokens_per_core_s(self) -> float:
        """What it would drive with a core to itself."""
        return 1e6 / self.cpu_us_per_token if self.cpu_us_per_token else 0.0


async def calibrate(
    scheme: str, *, num_processes: int, prompt_tokens: int, output_tokens: int
) -> Capacity:
    """Answers of `output_tokens` tokens, one a message, as fast as they can be read; each process
    has a null server of its own. Raises RuntimeError."""
    parts = await asyncio.gather(
        *(_drive(scheme, prompt_tokens, output_tokens) for _ in range(num_processes))
    )
    return capacity_of(scheme, output_tokens, parts)


async def _drive(scheme: str, prompt_tokens: int, output_tokens: int) -> Offered:
    async with null_server(scheme) as target:
        load = Load(
            target,
            prompt_tokens=str(prompt_tokens),
            output_tokens=str(output_tokens),
            num_streams=_STREAMS,
            duration_s=_DURATION_S,
            model=MODEL,
        )
        return await run_load(load)


def capacity_of(scheme: str, output_tokens: int, parts: Sequence[Offered]) -> Capacity:
    samples = [sample for part in parts for sample in part.samples]
    num_tokens = sum(sample.num_tokens for sample in samples)
    num_requests = sum(sample.status == OK for sample in samples)
    elapsed_s = max((s.at_s + (s.e2e_s or 0.0) for s in samples), default=0.0) or 1.0
    cpu_s = sum(part.client_cpu_s for part in parts)
    return Capacity(
        scheme,
        output_tokens,
        requests_per_s=num_requests / elapsed_s,
        tokens_per_s=num_tokens / elapsed_s,
        cpu=sum(part.client_cpu for part in parts),
        cpu_us_per_token=1e6 * cpu_s / num_tokens if num_tokens else 0.0,
    )


@asynccontextmanager
async def null_server(scheme: str, *, gap_ms: float = 0.0) -> AsyncIterator[str]:
    """A null server in a process of its own: its target. Raises RuntimeError."""
    command, environment = own_module("null_server")
    process = await asyncio.create_subprocess_exec(
        *(*command, "--scheme", scheme, "--gap-ms", str(gap_ms)),
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        if not line.startswith("READY "):
            raise RuntimeError("the null server did not start")
        yield line.removeprefix("READY ").strip()
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
