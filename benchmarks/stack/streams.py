"""Concurrent streams: `python -m benchmarks.stack.streams`.

    A  16 streams at once through the whole served stack: gateway, prefill and decode worker
    B  the same prompts, one after another, by transformers' generate
    C  8 streams at once through the served stack
    D  the same prompts as one batch in a plain loop over ModelRunner, in one process

Aims: A at least 4 times as fast as B; C at most 15 % slower than D. Same model, dtype and number
of threads per process; greedy, end-of-sequence ignored. Every repetition has prompts of its own,
so that no cache helps, and does A, B, C and D in turn, so that ratios are of neighbours in time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from baton.loadtest.environment import describe_environment
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.interrupt import exit_code
from baton.shared.model_files.named import model_dir
from baton.shared.sampling import SamplingParams
from benchmarks.checkout import DEMO_MODEL, RESULTS
from benchmarks.stack.other_load import OtherLoad
from benchmarks.stack.served import generate_all, served

_MAX_OTHER_CORES = 0.15
"""More than that, and a repetition is done again."""
_MAX_TRIES = 20

Prompts = Sequence[Sequence[int]]
Run = Callable[[Prompts], tuple[float, list[list[int]]]]
"""Prompts → seconds, and the generated token ids."""


@dataclass
class Series:
    """What was measured of one subject, one number per repetition."""

    name: str
    num_streams: int
    run: Run
    tokens_per_s: list[float] = field(default_factory=list)


@dataclass
class Quality:
    """What says how far the figures can be trusted."""

    num_answers: int = 0
    num_same: int = 0
    """Answers that were token by token those of the baseline."""
    num_disturbed: int = 0
    """Repetitions that were done again because other processes kept the machine busy."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    environment = describe_environment()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model if args.model.is_dir() else _random_model(Path(scratch))
        with served(model, num_threads=args.threads) as addresses:
            series = _series(model, addresses["grpc"], args.new_tokens)
            quality = measure(series, args)
    result = {
        "model": model.name if args.model.is_dir() else "random llama of the demo model's size",
        "dtype": "float32",
        "threads_per_process": args.threads,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repetitions": args.repetitions,
        "environment": environment,
        "tokens_per_s": {each.name: each.tokens_per_s for each in series},
        "served_over_transformers": _ratios(series[0], series[1]),
        "served_over_plain_loop": _ratios(series[2], series[3]),
        "quality": asdict(quality),
    }
    print_report(result)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {args.output}")


def _series(model: Path, address: str, new_tokens: int) -> list[Series]:
    def over_the_wire(prompts: Prompts) -> tuple[float, list[list[int]]]:
        return generate_all(address, prompts, new_tokens)

    return [
        Series("A served, 16 streams", 16, over_the_wire),
        Series("B transformers, one by one", 16, _transformers(model, new_tokens)),
        Series("C served, 8 streams", 8, over_the_wire),
        Series("D plain loop, batch of 8", 8, _plain_loop(model, new_tokens)),
    ]


def measure(series: list[Series], args: argparse.Namespace) -> Quality:
    """Fills the series, after a repetition that warms up."""
    quality = Quality()
    others = OtherLoad()
    for number in range(args.repetitions * _MAX_TRIES):
        rates = [_measure_pair(pair, number, args, quality) for pair in _pairs(series)]
        busy = others.cores()
        is_disturbed = busy > _MAX_OTHER_CORES
        print(f"{number}: others kept {busy:.2f} cores busy{', again' * is_disturbed}", flush=True)
        quality.num_disturbed += is_disturbed and number > 0
        if number == 0 or is_disturbed:
            continue
        for each, rate in zip(series, [rate for pair in rates for rate in pair], strict=True):
            each.tokens_per_s.append(rate)
        if len(series[0].tokens_per_s) == args.repetitions:
            return quality
    raise SystemExit("the machine is too busy with other things to measure anything")


def _pairs(series: list[Series]) -> list[tuple[Series, Series]]:
    """Each subject with its baseline."""
    return list(zip(series[::2], series[1::2], strict=True))


def _measure_pair(
    pair: tuple[Series, Series], number: int, args: argparse.Namespace, quality: Quality
) -> list[float]:
    """Tokens per second of both, on the same prompts."""
    prompts = _prompts(f"{pair[0].name}/{number}", pair[0].num_streams, args.prompt_tokens)
    runs = [each.run(prompts) for each in pair]
    quality.num_answers += len(prompts)
    quality.num_same += sum(a == b for a, b in zip(runs[0][1], runs[1][1], strict=True))
    return [sum(map(len, token_ids)) / elapsed_s for elapsed_s, token_ids in runs]


def _prompts(seed: str, num_prompts: int, mean_tokens: int) -> list[list[int]]:
    """Random token ids; lengths differ by up to a tenth."""
    draw = random.Random(seed)
    spread = mean_tokens // 10
    return [
        [draw.randrange(16, 4096) for _ in range(mean_tokens + draw.randint(-spread, spread))]
        for _ in range(num_prompts)
    ]


def _transformers(model_dir: Path, new_tokens: int) -> Run:
    model: Any = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def run(prompts: Prompts) -> tuple[float, list[list[int]]]:
        started_s = time.perf_counter()
        answers = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
            )
            answers.append(output[0, len(prompt) :].tolist())
        return time.perf_counter() - started_s, answers

    return run


def _plain_loop(model_dir: Path, new_tokens: int) -> Run:
    config = EngineConfig(model_dir, device="cpu", dtype="float32", num_blocks=512)
    loop = PlainLoop(ModelRunner(config))
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)

    def run(prompts: Prompts) -> tuple[float, list[list[int]]]:
        started_s = time.perf_counter()
        answers = loop.generate(prompts, [params] * len(prompts))
        return time.perf_counter() - started_s, answers

    return run


def _random_model(directory: Path) -> Path:
    """As large as the demo model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _ratios(ours: Series, baseline: Series) -> list[float]:
    return [a / b for a, b in zip(ours.tokens_per_s, baseline.tokens_per_s, strict=True)]


def print_report(result: dict[str, Any]) -> None:
    for name, value in result["environment"].items():
        print(f"{name:14} {value}")
    for name in ("model", "dtype", "threads_per_process", "prompt_tokens", "new_tokens"):
        print(f"{name:14} {result[name]}")
    print(f"\n{'tokens/s':32} {'median':>9} {'min':>9} {'max':>9}")
    for name, values in result["tokens_per_s"].items():
        print(f"{name:32} {_spread(values)}")
    print(f"\n{'paired ratio':32} {'median':>9} {'min':>9} {'max':>9}   aim")
    for name, aim in (("served_over_transformers", 4.0), ("served_over_plain_loop", 0.85)):
        print(f"{name:32} {_spread(result[name])}   at least {aim}")
    print(f"\n{result['quality']}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):9.2f} {min(values):9.2f} {max(values):9.2f}"


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stack.streams", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model", type=model_dir, default=DEMO_MODEL, help="default: the demo model"
    )
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--output", type=Path, default=RESULTS / "streams.json")
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return args


if __name__ == "__main__":
    sys.exit(exit_code(main))
