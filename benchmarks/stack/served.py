"""The whole served stack as a benchmark's subject: `baton up` and concurrent streams to it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvloop

from baton.loadtest.drivers import request_of
from baton.shared.directory.embedded import dying_with_us
from baton.shared.rpc.serve import internal_channel
from baton.v1 import inference_service_pb2_grpc
from benchmarks.checkout import ROOT, set_import_path


@contextmanager
def served(
    model: Path, *, num_threads: int, counts: Sequence[str] = (), http: bool = False
) -> Iterator[dict[str, str]]:
    """Gateway, prefill and decode worker as `baton up` starts them → the gateway's addresses:
    `grpc`, and `http` if asked to.

    `counts`: other roles, as flags of `baton up`.
    """
    flags = ["up", "--model", str(model), "--port", "0", "--dtype", "float32", "--device", "cpu"]
    set_import_path()
    environment = {
        **os.environ,
        "BATON_THREADS": str(num_threads),
        "BATON_LOG_LEVEL": "warning",
        "BATON_HTTP_PORT": "0" if http else "none",
    }
    with started("baton.services.launcher", *flags, *counts, environment=environment) as up:
        yield up[1]


@contextmanager
def started(
    module: str, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A process that runs `module`, and what it says beside READY; it is ended afterwards.

    Raises:
        RuntimeError: it ended before it was ready.
    """
    with subprocess.Popen(
        dying_with_us([sys.executable, "-m", module, *flags]),
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C is for this process, which then ends its child.
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            ready, *fields = process.stdout.readline().split() or [""]
            if ready != "READY":
                raise RuntimeError(f"{module} did not start")
            yield process, dict(field.split("=", 1) for field in fields)
        finally:
            process.terminate()
            # Leaving `with` would not wait for it after a KeyboardInterrupt.
            process.wait()


def generate_all(
    address: str, prompts: Sequence[Sequence[int]], max_tokens: int
) -> tuple[float, list[list[int]]]:
    """All prompts at once, greedy, end-of-sequence ignored → seconds from the first request to
    the last token, and the token ids by prompt."""
    return uvloop.run(_generate_all(address, prompts, max_tokens))


async def _generate_all(
    address: str, prompts: Sequence[Sequence[int]], max_tokens: int
) -> tuple[float, list[list[int]]]:
    async with internal_channel(address) as channel:
        await channel.channel_ready()
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        started_s = time.perf_counter()
        answers = await asyncio.gather(*(_generate(stub, prompt, max_tokens) for prompt in prompts))
        return time.perf_counter() - started_s, answers


async def _generate(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub,
    prompt: Sequence[int],
    max_tokens: int,
) -> list[int]:
    token_ids: list[int] = []
    async for response in stub.Generate(request_of(prompt, max_tokens)):
        if response.HasField("chunk"):
            token_ids += response.chunk.token_ids
    return token_ids
