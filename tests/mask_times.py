"""What constraints cost a worker: `python -m tests.mask_times --model DIR`.

Compiles made-up JSON schemas and draws an answer from the masks of each, by chance. Prints the
times of compiling and of masks, the first mask of an answer apart, as JSON. Single-threaded.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np

from baton.shared.constraints.compiler import compile_constraint
from baton.shared.constraints.matcher import AnswerMatcher
from baton.shared.constraints.tokens import TokenTable
from baton.shared.model_files.info import load_model_info
from baton.v1 import types_pb2
from tests.schemas import make_schema

_MOST_TOKENS = 400


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mask_times", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--num-schemas", type=int, default=500)
    args = parser.parse_args()
    vocab_size = load_model_info(args.model).vocab_size
    started = time.perf_counter()
    table = TokenTable.load(args.model, vocab_size)
    assert table is not None
    load_s = time.perf_counter() - started
    compiling: list[float] = []
    first: list[float] = []
    later: list[float] = []
    num_forced = 0
    for seed in range(args.num_schemas):
        constraint = types_pb2.Constraint(json_schema=json.dumps(make_schema(seed)))
        started = time.perf_counter()
        compiled = compile_constraint(constraint, table)
        compiling.append(time.perf_counter() - started)
        matcher, drawing = AnswerMatcher(compiled), random.Random(seed)
        for index in range(_MOST_TOKENS):
            num_forced += bool(matcher.forced(1))
            started = time.perf_counter()
            mask = matcher.masks()[0]
            (later if index else first).append(time.perf_counter() - started)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
            token = drawing.choice(np.flatnonzero(bits).tolist())
            if token in table.end_ids:
                break
            matcher.take([token])
    report = {
        "model": args.model.name,
        "vocab_size": vocab_size,
        "num_masks": len(first) + len(later),
        "num_forced_tokens": num_forced,
        "load_tokenizer_s": round(load_s, 2),
        "compile_ms": _percentiles(compiling, 1e3),
        "first_mask_us": _percentiles(first, 1e6),
        "mask_us": _percentiles(later, 1e6),
    }
    print(json.dumps(report, indent=2))


def _percentiles(seconds: list[float], unit: float) -> dict[str, float]:
    marks = {"p50": 50, "p99": 99, "max": 100}
    return {
        name: round(float(np.percentile(seconds, mark)) * unit, 2) for name, mark in marks.items()
    }


if __name__ == "__main__":
    main()
