"""What it costs that a model runs through transformers: `python -m benchmarks.cpu.model_impl`.

One qwen3, dummy weights, float32: through Baton's own file and, over the same cache and attention,
through transformers' code. Both engines stand in this process and take turns, round by round, so
that what else the machine does meets both; printed are medians over the rounds, and the median of
the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from baton.loadtest.environment import describe_environment
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.sampling import SamplingParams
from benchmarks.checkout import RESULTS

IMPLEMENTATIONS = ("baton", "transformers")
_GREEDY = SamplingParams(temperature=0.0)
_CONTEXT = 256


@dataclass(frozen=True)
class Work:
    name: str
    rows: int
    tokens: int
    """Of each row in the step."""
    position: int


WORKS = (
    *(Work(f"decode, batch {rows}", rows, 1, _CONTEXT) for rows in (1, 8, 32)),
    Work("prompt chunk of 512", 1, 512, 0),
)


@dataclass(frozen=True)
class Row:
    work: str
    baton_ms: float
    transformers_ms: float
    ratio: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.model_impl", description=__doc__
    )
    parser.add_argument(
        "--hidden-size", type=int, default=1024, help="its own; others scale with it"
    )
    parser.add_argument("--layers", type=int, default=8, help="of Qwen3-0.6B's 28")
    parser.add_argument("--vocab-size", type=int, default=32_768, help="of its 151,936")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "model_impl_cpu.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        write_config(Path(directory), args.hidden_size, args.layers, args.vocab_size)
        runners = [
            ModelRunner(
                EngineConfig(
                    Path(directory),
                    device="cpu",
                    dtype="float32",
                    load_format="dummy",
                    model_impl=name,
                    num_blocks=32 * (_CONTEXT // 16 + 1),
                )
            )
            for name in IMPLEMENTATIONS
        ]
        rows = [measure(work, runners, args.rounds) for work in WORKS]
    print_rows(rows)
    found = {
        "environment": describe_environment(),
        "hidden_size": args.hidden_size,
        "layers": args.layers,
        "vocab_size": args.vocab_size,
        "threads": args.threads,
        "rounds": args.rounds,
        "determinism": [runner.determinism for runner in runners],
        "numerics": [runner.numerics for runner in runners],
        "rows": rows_to_json(rows),
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def print_rows(rows: Sequence[Row]) -> None:
    for row in rows:
        print(
            f"{row.work:28} baton {row.baton_ms:8.2f} ms, transformers {row.transformers_ms:8.2f} "
            f"ms, ratio {row.ratio:5.2f}",
            flush=True,
        )


def rows_to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def write_config(directory: Path, hidden_size: int, num_layers: int, vocab_size: int) -> None:
    """Widths in the proportions of Qwen3-0.6B."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": hidden_size // 128,
        "head_dim": 128,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": None,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def measure(work: Work, runners: Sequence[ModelRunner], num_rounds: int) -> Row:
    times: list[list[float]] = [[] for _ in runners]
    for number in range(num_rounds + 1):
        # Who is first changes.
        order = range(len(runners)) if number % 2 else reversed(range(len(runners)))
        for which in order:
            batch = _batch(work, runners[which])
            started_s = time.perf_counter()
            runners[which].forward(batch)
            # The first round warms up.
            if number:
                times[which].append(1e3 * (time.perf_counter() - started_s))
    ratios = [theirs / own for own, theirs in zip(*times, strict=True)]
    own, theirs = (statistics.median(each) for each in times)
    return Row(work.name, own, theirs, statistics.median(ratios))


def _batch(work: Work, runner: ModelRunner) -> Batch:
    draw = random.Random(work.name)
    [group] = runner.groups
    num_blocks = group.num_blocks_for(work.position + work.tokens, runner.kv_cache.block_size)
    return Batch(
        [
            BatchRow(
                draw.choices(range(runner.model_config.vocab_size), k=work.tokens),
                work.position,
                [list(range(row * num_blocks, (row + 1) * num_blocks))],
                _GREEDY,
            )
            for row in range(work.rows)
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
