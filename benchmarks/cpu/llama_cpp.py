"""A decode step beside llama.cpp's, of the same GGUF file: `python -m benchmarks.cpu.llama_cpp
FILE.gguf`.

The package llama-cpp-python has to be importable (in a folder of its own, which PYTHONPATH names).
Both sides decode greedily in this process, Baton through the engine loop of a worker, on one
thread; they take turns of a few steps. Told is the CPU time of the thread, in which what else the
machine does shows as far as they share caches and cores, and the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from baton.loadtest.environment import describe_environment
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.model_files.named import model_dir
from benchmarks.checkout import RESULTS
from benchmarks.in_process import InProcessEngine, random_prompts

_STEPS_A_TURN = 4
_BLOCK = 16


@dataclass(frozen=True)
class Row:
    streams: int
    context: int
    """Tokens of each stream's prompt; steps come behind it."""
    baton_ms: float
    baton_least_ms: float
    llama_cpp_ms: float
    llama_cpp_least_ms: float
    ratio: float
    """Of a step, the median of the turns'."""


class LlamaCpp:
    """Sequences that decode together, greedily."""

    def __init__(self, file: Path, prompts: Sequence[Sequence[int]], num_steps: int) -> None:
        self._library = library = import_module("llama_cpp.llama_cpp")
        library.llama_backend_init()
        model_params = library.llama_model_default_params()
        self._model = library.llama_model_load_from_file(str(file).encode(), model_params)
        params = library.llama_context_default_params()
        params.n_seq_max = len(prompts)
        params.n_ctx = sum(map(len, prompts)) + len(prompts) * (num_steps + 256)
        params.n_threads = params.n_threads_batch = 1
        params.no_perf = True
        self._context = library.llama_init_from_model(self._model, params)
        vocab = library.llama_model_get_vocab(self._model)
        self._vocab_size = library.llama_vocab_n_tokens(vocab)
        self._batch = library.llama_batch_init(512, 0, 1)
        self._positions = [len(prompt) for prompt in prompts]
        self._tokens = [self._prompt(number, prompt) for number, prompt in enumerate(prompts)]

    def step(self) -> None:
        rows = list(zip(self._tokens, self._positions, range(len(self._tokens)), strict=True))
        self._decode([(*row, True) for row in rows])
        self._tokens = [self._greedy(place) for place in range(len(rows))]
        self._positions = [position + 1 for position in self._positions]

    def close(self) -> None:
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _prompt(self, number: int, prompt: Sequence[int]) -> int:
        last = len(prompt) - 1
        self._decode([(token, at, number, at == last) for at, token in enumerate(prompt)])
        return self._greedy(last)

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for place, (token, position, number, is_wanted) in enumerate(rows):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, number
            batch.logits[place] = is_wanted
        if self._library.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode fails")

    def _greedy(self, place: int) -> int:
        logits = self._library.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.llama_cpp", description=__doc__)
    parser.add_argument("model", type=model_dir, help="a GGUF file, or the name of a fetched model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=100)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--kernels", default="auto", help="Baton's")
    parser.add_argument("--output", type=Path, default=RESULTS / "llama_cpp.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    num_blocks = max(args.streams) * ((args.context + args.turns * _STEPS_A_TURN) // _BLOCK + 4)
    config = EngineConfig(
        args.model, device="cpu", dtype="bfloat16", kernels=args.kernels, num_blocks=num_blocks
    )
    runner = ModelRunner(config)
    rows = [_compare(runner, args, streams) for streams in args.streams]
    library = import_module("llama_cpp.llama_cpp")
    result = {
        "environment": describe_environment(),
        "numerics": runner.numerics,
        "llama-cpp-python": import_module("llama_cpp").__version__,
        "llama.cpp": library.llama_print_system_info().decode(),
        "turns": args.turns,
        "rows": [asdict(row) for row in rows],
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _compare(runner: ModelRunner, args: argparse.Namespace, streams: int) -> Row:
    num_steps = args.turns * _STEPS_A_TURN + 2 * streams + 8
    prompts = random_prompts(streams, args.context, runner.model_config.vocab_size)
    engine = InProcessEngine(runner, max_num_seqs=streams)
    for prompt in prompts:
        engine.submit(prompt, num_steps)
    for _ in range(streams + 4):
        engine.engine.run_once(may_wait=False)
    theirs = LlamaCpp(args.model / "model.gguf", prompts, num_steps)
    theirs.step()
    gc.collect()
    gc.disable()
    turns: list[list[float]] = [[], []]
    sides = lambda: engine.engine.run_once(may_wait=False), theirs.step
    for number in range(args.turns):
        for which in (0, 1) if number % 2 else (1, 0):
            turns[which].append(_turn(sides[which]))
    gc.enable()
    # Each of the steps that count had all streams.
    if engine.engine.num_sequences != streams:
        raise RuntimeError("streams have ended before the last step")
    engine.run_until_idle()
    theirs.close()
    own, other = turns
    row = Row(
        streams,
        args.context,
        statistics.median(own),
        min(own),
        statistics.median(other),
        min(other),
        statistics.median(a / b for a, b in zip(own, other, strict=True)),
    )
    print(
        f"{streams} streams: {row.baton_ms:.2f} ms a step (least {row.baton_least_ms:.2f}), "
        f"llama.cpp {row.llama_cpp_ms:.2f} ({row.llama_cpp_least_ms:.2f}), ratio {row.ratio:.2f}",
        flush=True,
    )
    return row


def _turn(step: Callable[[], object]) -> float:
    """ms of CPU time a step."""
    started_s = time.thread_time()
    for _ in range(_STEPS_A_TURN):
        step()
    return 1e3 * (time.thread_time() - started_s) / _STEPS_A_TURN


if __name__ == "__main__":
    sys.exit(main())
