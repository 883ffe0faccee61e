"""A load from its shards to its samples."""

from __future__ import annotations

import asyncio
import json
import os
import site
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baton.loadtest.samples import Offered, Sample
from baton.loadtest.shard import Share
from baton.loadtest.spec import Load

_IMPORTED_FROM = str(Path(__file__).parents[2])
_LINE_BYTES = 1 << 26


async def run_load(load: Load, num_processes: int = 1) -> Offered:
    """Offers `load` from that many processes, or fewer when a closed loop has fewer clients.

    Raises RuntimeError when one of them fails.
    """
    if load.is_closed:
        num_processes = min(num_processes, load.num_streams)
    shards = [Shard(load, Share(index, num_processes)) for index in range(num_processes)]
    try:
        await asyncio.gather(*(shard.prepare() for shard in shards))
        results = await asyncio.gather(*(shard.run() for shard in shards))
    finally:
        await asyncio.gather(*(shard.close() for shard in shards))
    samples = [sample for result, _ in results for sample in result]
    samples.sort(key=lambda sample: sample.at_s)
    costs = [cost for _, cost in results]
    return Offered(
        samples,
        client_cpu=max(cost["cpu_s"] / cost["elapsed_s"] for cost in costs),
        lag_s=[lag_s for cost in costs for lag_s in cost["lag_s"]],
        client_cpu_s=sum(cost["cpu_s"] for cost in costs),
    )


def own_module(name: str) -> tuple[list[str], dict[str, str]]:
    """How a command begins that runs a module of this package, installed or not; and its
    environment."""
    environment = dict(os.environ)
    # Installed packages are found anyhow, and their folder must not come before Python's own.
    if _IMPORTED_FROM not in (*site.getsitepackages(), site.getusersitepackages()):
        paths = (_IMPORTED_FROM, environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # -P: modules must not come from the working directory, which is the user's.
    return [sys.executable, "-P", "-m", f"baton.loadtest.{name}"], environment


class Shard:
    def __init__(self, load: Load, share: Share) -> None:
        self._asked = {"load": asdict(load), "share": asdict(share)}
        self._process: asyncio.subprocess.Process | None = None

    async def prepare(self) -> None:
        command, environment = own_module("shard")
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
            env=environment,
        )
        self._say(json.dumps(self._asked))
        await self._hear()

    async def run(self) -> tuple[list[Sample], dict[str, Any]]:
        """What one generator saw, and what it cost."""
        self._say("go")
        samples = []
        while "cpu_s" not in (line := await self._hear()):
            samples.append(Sample(**line))
        return samples, line

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
