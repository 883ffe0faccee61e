"""Recorded arrivals: Mooncake's form (JSON lines) and Azure's (CSV), and what is made of them.

    {"timestamp": 1500, "input_length": 1030, "output_length": 20, "hash_ids": [0, 7, 8]}
    TIMESTAMP,ContextTokens,GeneratedTokens

Mooncake's timestamps are milliseconds; each of `hash_ids` names a block of 512 prompt tokens, of
which the last may be shorter, and equal ids are equal tokens. Azure's traces have no such
structure: no two prompts have anything in common.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from baton.loadtest.spec import Load, LoadError

BLOCK_TOKENS = 512
_AZURE_FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Recorded:
    """One request; `at_s` counts from the first one. `blocks` is empty where the trace has none."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Replay:
    """What a trace becomes under a load's scales and caps; blocks have `block_tokens` tokens."""

    requests: list[Recorded]
    block_tokens: int
    num_capped_prompts: int
    num_capped_outputs: int


def read_trace(path: Path) -> list[Recorded]:
    """The requests in order of arrival; the first line shows which form it is. Raises LoadError,
    naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise LoadError(f"--trace {path}: {reason}") from None
    if not any(line.strip() for line in lines):
        raise LoadError(f"--trace {path}: the file is empty")
    read = _read_mooncake if lines[0].lstrip().startswith("{") else _read_azure
    requests = sorted(read(path, lines), key=lambda request: request.at_s)
    if not requests:
        raise LoadError(f"--trace {path}: no requests in it")
    first_s = requests[0].at_s
    return [
        Recorded(r.at_s - first_s, r.prompt_tokens, r.output_tokens, r.blocks) for r in requests
    ]


def replay(load: Load) -> Replay:
    """Applies window, limit and time scale, then scales lengths and caps them. A prompt that is cut
    keeps its beginning, so that what prompts share stays shared. Raises LoadError."""
    assert load.trace is not None
    recorded = read_trace(Path(load.trace))
    start_s, end_s = load.window_s or (0.0, float("inf"))
    chosen = [request for request in recorded if start_s <= request.at_s < end_s]
    chosen = chosen[: load.num_requests]
    if load.duration_s is not None:
        last_s = start_s + load.duration_s / load.time_scale
        chosen = [request for request in chosen if request.at_s < last_s]
    if not chosen:
        raise LoadError(f"--trace {load.trace}: no request within the window that was asked for")
    block_tokens = max(1, round(BLOCK_TOKENS * load.length_scale))
    prompts = [_scaled(request.prompt_tokens, load) for request in chosen]
    outputs = [_scaled(request.output_tokens, load) for request in chosen]
    most_prompt, most_output = load.max_prompt or max(prompts), load.max_output or max(outputs)
    return Replay(
        [
            Recorded(
                (request.at_s - start_s) * load.time_scale,
                min(prompt, most_prompt),
                min(output, most_output),
                request.blocks,
            )
            for request, prompt, output in zip(chosen, prompts, outputs, strict=True)
        ],
        block_tokens,
        num_capped_prompts=sum(prompt > most_prompt for prompt in prompts),
        num_capped_outputs=sum(output > most_output for output in outputs),
    )


def _scaled(num_tokens: int, load: Load) -> int:
    return max(1, round(num_tokens * load.length_scale))


def _read_mooncake(path: Path, lines: Sequence[str]) -> Iterator[Recorded]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry: dict[str, Any] = json.loads(line)
            yield _recorded(
                float(entry["timestamp"]) / 1e3,
                int(entry["input_length"]),
                int(entry["output_length"]),
                tuple(int(block) for block in entry.get("hash_ids", ())),
            )
        except KeyError as error:
            raise LoadError(f"--trace {path} line {number}: no field {error}") from None
        except (ValueError, TypeError) as error:
            raise LoadError(f"--trace {path} line {number}: {error}") from None


def _read_azure(path: Path, lines: Sequence[str]) -> Iterator[Recorded]:
    rows = csv.DictReader(lines)
    if set(_AZURE_FIELDS) - set(rows.fieldnames or ()):
        raise LoadError(
            f"--trace {path}: neither JSON lines of the Mooncake form nor a CSV with the columns"
            f" {','.join(_AZURE_FIELDS)}"
        )
    for row in rows:
        try:
            yield _recorded(
                # Seconds have seven decimals, one more than datetime takes.
                datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
                int(row["ContextTokens"]),
                int(row["GeneratedTokens"]),
            )
        except (ValueError, TypeError) as error:
            raise LoadError(f"--trace {path} line {rows.line_num}: {error}") from None


def _recorded(
    at_s: float, prompt_tokens: int, output_tokens: int, blocks: tuple[int, ...] = ()
) -> Recorded:
    """Raises ValueError."""
    if prompt_tokens < 0 or output_tokens < 0:
        raise ValueError("a negative length")
    if blocks and len(blocks) * BLOCK_TOKENS < prompt_tokens:
        raise ValueError(f"{len(blocks)} blocks for {prompt_tokens} prompt tokens")
    return Recorded(at_s, max(1, prompt_tokens), max(1, output_tokens), blocks)
