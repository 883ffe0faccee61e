"""The command line of a load test, and the loads that it means."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from baton.loadtest.lengths import FORMS
from baton.loadtest.samples import Slo
from baton.loadtest.spec import Load, LoadError
from baton.shared.rpc.flags import Parser, add_flag

PROGRAM = "baton load"
EXIT_USAGE = 2
DEFAULT_DURATION_S = 20.0
DEFAULT_SLOS = ("1:0.025",)
_SEEDS = 1000
DESCRIPTION = """\
Load on a running endpoint, and what its clients saw.

  baton load --target grpc://127.0.0.1:50051 --rate 4
  baton load --target http://127.0.0.1:8000 --rate 1,2,4,8 --slo 0.5:0.05 --output out
  baton load --target grpc://127.0.0.1:50051 --streams 16 --requests 200 \\
      --prompt-tokens lognormal:256:0.6 --output-tokens uniform:16:64
  baton load --target grpc://127.0.0.1:50051 --rate 2 --prefixes 4 --prefix-tokens 256
  baton load --target grpc://127.0.0.1:50051 --streams 4 --requests 60 --turns 5
  baton load --target grpc://127.0.0.1:50051 --trace mooncake_conversation.jsonl \\
      --window 0:600 --time-scale 0.1 --length-scale 0.1 --max-prompt 3500 --max-output 64
  baton load --target grpc://127.0.0.1:50051 --metrics http://127.0.0.1:8000/metrics
  baton load --calibrate --target http://

Without --rate and --trace it is a closed loop: --streams clients that each wait for their answer.
Lengths are a number of tokens, uniform:LOW:HIGH, normal:MEAN:SD or lognormal:MEDIAN:SIGMA.
Exit codes: 0, 1 when no request was answered, 2 when the load or the target is impossible, 130
interrupted.
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flag(
        parser,
        "--target",
        type=str,
        default="grpc://127.0.0.1:50051",
        metavar="URL",
        help="grpc://, http:// or https://HOST:PORT; HOST:PORT is gRPC",
    )
    parser.add_argument(
        "--model", default="", metavar="NAME", help="which must be served there; default: any"
    )
    _add_arrivals(parser.add_argument_group("when"))
    _add_lengths(parser.add_argument_group("what"))
    _add_trace(parser.add_argument_group("traces"))
    _add_rest(parser.add_argument_group("how, and what of it is told"))
    return parser.parse_args(argv)


def _add_arrivals(group: Any) -> None:
    add = group.add_argument
    add("--rate", metavar="R[,R]", help="conversations a second; several: one after another")
    add("--arrivals", choices=("poisson", "constant", "bursty"), default="poisson")
    add(
        "--burstiness",
        type=float,
        metavar="X",
        default=2.0,
        help="of bursty: gaps' sd / mean; Poisson has 1",
    )
    add("--streams", type=int, metavar="N", help="clients of a closed loop (default: 1)")
    add("--requests", type=int, metavar="N", help="in all; of a trace: the first ones")
    add(
        "--duration",
        type=float,
        metavar="S",
        help=f"seconds of arrivals (default: {DEFAULT_DURATION_S:g}, if not --requests or a trace)",
    )


def _add_lengths(group: Any) -> None:
    add = group.add_argument
    add("--prompt-tokens", default="512", metavar="LENGTH", help=FORMS)
    add("--output-tokens", default="64", metavar="LENGTH", help="of answers, in the same forms")
    add(
        "--prefixes",
        type=int,
        metavar="N",
        default=0,
        help="groups of prompts with a common beginning",
    )
    add("--prefix-tokens", type=int, metavar="N", default=256, help="tokens of such a beginning")
    add(
        "--turns",
        type=int,
        metavar="N",
        default=1,
        help="of a conversation; answers are part of what follows",
    )
    add(
        "--think-time",
        type=float,
        metavar="S",
        default=0.0,
        help="seconds from an answer to the next turn",
    )
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="prompts draw from it; default: the model's, else 1024",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help="the same prompts again, which caches may still hold; default: drawn, and told",
    )


def _add_trace(group: Any) -> None:
    add = group.add_argument
    add("--trace", metavar="FILE", help="Mooncake's JSON lines, or Azure's CSV")
    add("--time-scale", type=float, metavar="X", default=1.0, help="0.1 replays ten times as fast")
    add("--window", metavar="FROM:TO", help="seconds, in the trace's own time")
    add(
        "--length-scale",
        type=float,
        metavar="X",
        default=1.0,
        help="of prompts, their blocks, and answers",
    )
    add(
        "--max-prompt",
        type=int,
        metavar="N",
        help="tokens of a prompt, at most; longer ones keep their beginning",
    )
    add("--max-output", type=int, metavar="N", help="tokens of an answer, at most")


def _add_rest(group: Any) -> None:
    add = group.add_argument
    add(
        "--slo",
        action="append",
        metavar="TTFT:TPOT",
        help=f"seconds; may be repeated (default: {DEFAULT_SLOS[0]})",
    )
    add("--clients", type=int, metavar="N", default=1, help="generator processes")
    add("--drain", type=float, metavar="S", default=30.0, help="seconds that the last requests get")
    add("--timeout", type=float, metavar="S", default=600.0, help="seconds, for one request")
    add("--warm-up", type=int, metavar="N", default=1, help="requests before the clock starts")
    add("--output", type=Path, metavar="DIR", help="report.html, report.json, requests.csv")
    add(
        "--metrics",
        metavar="URL[,URL]",
        help="/metrics of gateways, and of workers for cached tokens and hand-off, to be compared"
        " with what clients saw (default: those of a target that speaks HTTP; none: do not)",
    )
    add("--calibrate", action="store_true", help="say what the generator itself can drive")


def loads_of(args: argparse.Namespace) -> list[Load]:
    """One for each rate. Raises LoadError."""
    if args.trace is not None and args.rate is not None:
        raise LoadError("--trace has its own arrivals: --time-scale changes their rate")
    if args.streams is not None and (args.trace is not None or args.rate is not None):
        other = "--rate" if args.trace is None else "--trace"
        raise LoadError(f"--streams is a closed loop, and does not go with {other}")
    if args.clients < 1:
        raise LoadError("--clients: at least 1")
    duration_s = args.duration
    if duration_s is None and args.requests is None and args.trace is None:
        duration_s = DEFAULT_DURATION_S
    load = Load(
        target=args.target,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        arrivals=_arrivals(args),
        burstiness=args.burstiness,
        num_streams=1 if args.streams is None else args.streams,
        num_requests=args.requests,
        duration_s=duration_s,
        num_prefixes=args.prefixes,
        prefix_tokens=args.prefix_tokens if args.prefixes else 0,
        num_turns=args.turns,
        think_s=args.think_time,
        trace=args.trace,
        time_scale=args.time_scale,
        window_s=_window(args.window),
        length_scale=args.length_scale,
        max_prompt=args.max_prompt,
        max_output=args.max_output,
        model=args.model,
        vocab_size=1024 if args.vocab_size is None else args.vocab_size,
        seed=random.getrandbits(24) * _SEEDS if args.seed is None else args.seed,
        drain_s=args.drain,
        timeout_s=args.timeout,
    )
    rates = [0.0] if args.rate is None else _rates(args.rate)
    loads = [
        # Each rate has other prompts, so that none are found in a cache.
        replace(load, rate=rate, seed=load.seed + index)
        for index, rate in enumerate(rates)
    ]
    for one in loads:
        one.check()
    return loads


def slos_of(args: argparse.Namespace) -> list[Slo]:
    """Raises LoadError."""
    return [Slo(*_pair("--slo", text)) for text in args.slo or DEFAULT_SLOS]


def _arrivals(args: argparse.Namespace) -> str:
    if args.trace is not None:
        return "trace"
    return "closed" if args.rate is None else str(args.arrivals)


def _rates(text: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError:
        raise LoadError(f"--rate {text}: must be requests a second, such as 4 or 1,2,4") from None


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    start_s, end_s = _pair("--window", text)
    if start_s >= end_s:
        raise LoadError(f"--window {text}: it ends before it begins")
    return start_s, end_s


def _pair(flag: str, text: str) -> tuple[float, float]:
    try:
        first, second = map(float, text.split(":"))
    except ValueError:
        raise LoadError(f"{flag} {text}: must be two numbers of seconds, A:B") from None
    if not (first >= 0 and second >= 0):
        raise LoadError(f"{flag} {text}: not negative")
    return first, second
