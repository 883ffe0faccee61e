"""What a hand-off adds to a request: one at a time through a prefill and a decode worker, and
through a lone worker of role `both`.

    exposed       from the last chunk's end at the prefill worker to the sequence's joining the
                  batch of the decode worker: what was not hidden behind the prompt's computation;
                  of a model that keeps states these are in it, for they move last
    handed over   bytes of blocks, and of states
    TTFT          the client's first token; the prefill worker sends it before anything is moved
    second token  from the first one to the second, the exposed part included
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.services.launcher.roles import RoleCounts, StackConfig
from baton.shared.model_files.info import load_model_info
from baton.shared.rpc.serve import internal_channel
from baton.v1 import inference_service_pb2_grpc as pb_grpc
from benchmarks.stack.launched import StackOptions, running
from benchmarks.stack.stream_clients import token_times

_NUM_TOKENS = 8
_WARM_UP = 3


def measure_served(
    model_dir: Path,
    prompts: Sequence[int],
    *,
    gpus: tuple[str, ...],
    repetitions: int,
    worker_flags: tuple[str, ...],
    load_format: str,
) -> list[dict[str, Any]]:
    """One row for each arrangement and prompt length, medians in milliseconds."""
    rows: list[dict[str, Any]] = []
    for name, counts in (("pd", RoleCounts(1, 1, 0)), ("both", RoleCounts(0, 0, 1))):
        with tempfile.TemporaryDirectory() as traces:
            flags = (*worker_flags, "--trace-dir", traces, "--load-format", load_format)
            options = StackOptions(
                StackConfig(model_dir, counts, port=0, max_model_len=max(prompts) + 64),
                gpus=gpus,
                role_flags=dict.fromkeys(("prefill", "decode", "both"), flags),
            )
            measured = asyncio.run(_measure(options, prompts, repetitions))
            exposed = _exposed(Path(traces))
        for num_tokens, (ttfts, seconds) in measured.items():
            row: dict[str, Any] = {
                "arrangement": name,
                "prompt_tokens": num_tokens,
                "ttft_ms": statistics.median(ttfts) * 1e3,
                "second_token_ms": statistics.median(seconds) * 1e3,
            }
            if name == "pd":
                own = exposed[: _WARM_UP + repetitions][_WARM_UP:]
                exposed = exposed[_WARM_UP + repetitions :]
                row["exposed_ms"] = statistics.median(seconds for seconds, _ in own) * 1e3
                row["handed_over_mib"] = statistics.median(size for _, size in own) / 2**20
            rows.append(row)
            print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
    return rows


async def _measure(
    options: StackOptions, prompts: Sequence[int], repetitions: int
) -> dict[int, tuple[list[float], list[float]]]:
    """Prompt length → TTFTs and times from the first to the second token, in seconds."""
    measured = {}
    async with running(options) as stack, internal_channel(stack.address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        vocab_size = load_model_info(options.config.model_dir).vocab_size
        for num_tokens in prompts:
            times = [
                await _ask(stub, num_tokens, vocab_size) for _ in range(_WARM_UP + repetitions)
            ]
            ttfts, seconds = zip(*times[_WARM_UP:], strict=True)
            measured[num_tokens] = (list(ttfts), list(seconds))
    return measured


async def _ask(stub: Any, num_tokens: int, vocab_size: int) -> tuple[float, float]:
    """Seconds to the first token, and from it to the second."""
    prompt = random.choices(range(vocab_size), k=num_tokens)
    started_s = time.monotonic()
    arrivals = await token_times(stub, prompt, _NUM_TOKENS)
    return arrivals[0] - started_s, arrivals[1] - arrivals[0]


def _exposed(traces: Path) -> list[tuple[float, int]]:
    """By request, in order: seconds from its last chunk's end to its joining elsewhere, and the
    bytes that were moved in all."""
    ends: dict[str, float] = {}
    exposed = []
    events = [
        json.loads(line)
        for path in traces.glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    for event in sorted(events, key=lambda event: float(event["t"])):
        if event["event"] == "chunk" and event["is_last"]:
            ends[event["key"]] = event["t"]
        elif event["event"] == "joined" and event["key"] in ends:
            exposed.append((event["t"] - ends[event["key"]], event["num_pulled_bytes"]))
    return exposed


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
