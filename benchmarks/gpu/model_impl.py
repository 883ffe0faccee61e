"""What it costs on a GPU that a model runs through transformers: `python -m
benchmarks.gpu.model_impl`.

One qwen3, dummy weights, bfloat16: through Baton's own file and, over the same cache and attention,
through transformers' code. Baton's decode steps are CUDA graphs, those of transformers' code are
launched kernel by kernel. Both engines stand in this process, with their schedulers, and take turns
round by round; printed are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from baton.loadtest.environment import describe_environment
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from benchmarks.checkout import RESULTS
from benchmarks.cpu.model_impl import IMPLEMENTATIONS, Row, print_rows, rows_to_json, write_config
from benchmarks.in_process import InProcessEngine
from models.dummy_model import SHAPES, given_or_dummy

_DECODE = ((1, 1024), (8, 1024), (32, 1024))
_PREFILL = (512, 2048)
_NUM_STEPS = 48
_LONGEST = 2048
"""Of prompts, and of a step."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    with _model_dir(args) as directory:
        runners = [_start(directory, name, args.device) for name in IMPLEMENTATIONS]
    engines = [InProcessEngine(runner, max_num_seqs=32) for runner in runners]
    rows: list[Row] = []
    try:
        for batch, context in _DECODE:
            name = f"decode, batch {batch}, {context} tokens"
            rows.append(_measure(name, engines, args.rounds, _Decode(batch, context)))
            print_rows(rows[-1:])
        for num_tokens in _PREFILL:
            name = f"prompt of {num_tokens}"
            rows.append(_measure(name, engines, args.rounds, _Prefill(num_tokens)))
            print_rows(rows[-1:])
    finally:
        # What was measured is told, whatever came behind it.
        found: dict[str, Any] = {
            "environment": describe_environment(),
            "shape": args.shape or f"qwen3, {args.hidden_size} wide, {args.layers} layers",
            "rounds": args.rounds,
            "model_impl": [runner.model_impl for runner in runners],
            "determinism": [runner.determinism for runner in runners],
            "numerics": [runner.numerics for runner in runners],
            "rows": rows_to_json(rows),
        }
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


@contextmanager
def _model_dir(args: argparse.Namespace) -> Iterator[Path]:
    if args.shape is not None:
        with given_or_dummy(None, args.shape, has_tokenizer=False) as directory:
            yield directory
        return
    with tempfile.TemporaryDirectory() as directory:
        write_config(Path(directory), args.hidden_size, args.layers, args.vocab_size)
        yield Path(directory)


class _Decode:
    def __init__(self, batch: int, context: int) -> None:
        self._batch, self._context = batch, context

    def __call__(self, engine: InProcessEngine) -> float:
        """Seconds of a step."""
        return statistics.median(engine.decode(self._batch, self._context, _NUM_STEPS))


class _Prefill:
    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def __call__(self, engine: InProcessEngine) -> float:
        """Seconds until the prompt's first token."""
        return engine.prefill(1, self._num_tokens)


def _measure(
    name: str, engines: Sequence[InProcessEngine], num_rounds: int, work: _Decode | _Prefill
) -> Row:
    times: list[list[float]] = [[] for _ in engines]
    for number in range(num_rounds + 1):
        # Who is first changes.
        order = range(len(engines)) if number % 2 else reversed(range(len(engines)))
        for which in order:
            took_s = work(engines[which])
            # The first round warms up.
            if number:
                times[which].append(1e3 * took_s)
    ratios = [theirs / own for own, theirs in zip(*times, strict=True)]
    own, theirs = (statistics.median(each) for each in times)
    return Row(name, own, theirs, statistics.median(ratios))


def _start(directory: Path, name: str, device: str) -> ModelRunner:
    started_s = time.monotonic()
    runner = ModelRunner(
        EngineConfig(
            directory,
            device=device,
            # A CPU is for trials of this program.
            dtype="bfloat16" if device == "cuda" else "float32",
            load_format="dummy",
            model_impl=name,
            num_blocks=4096,
            max_model_len=2 * _LONGEST,
            token_budget=_LONGEST,
            max_num_seqs=32,
        )
    )
    print(f"{name} ready after {time.monotonic() - started_s:.1f} s", flush=True)
    return runner


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.model_impl", description=__doc__
    )
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        help="in place of the three that follow",
    )
    parser.add_argument(
        "--hidden-size", type=int, default=1024, help="Qwen3-0.6B's; others scale with it"
    )
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS / "model_impl_gpu.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
