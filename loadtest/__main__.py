"""The command `baton load`, which is also `python -m baton.loadtest`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from baton.loadtest.calibrate import Capacity, calibrate
from baton.loadtest.conversations import longest, workload_of
from baton.loadtest.environment import describe_environment
from baton.loadtest.options import EXIT_USAGE, PROGRAM, loads_of, parse_args, slos_of
from baton.loadtest.page import text_table
from baton.loadtest.report import Report, Run, check_writable
from baton.loadtest.run import run_load
from baton.loadtest.samples import OK, Slo, summarise
from baton.loadtest.scrape import Source, before, sources_of
from baton.loadtest.spec import Load, LoadError
from baton.loadtest.target import ModelFacts, Target, probe
from baton.shared.interrupt import exit_code

_WARM_UP_PROMPT = 16
_WARM_UP_OUTPUT = 4
_CALIBRATION_PROMPT = 128
_CALIBRATION_OUTPUTS = (1, 64)


def run(argv: Sequence[str] | None = None) -> int:
    """Runs `main`; Ctrl-C has an exit code of its own."""
    return exit_code(lambda: main(argv))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.calibrate:
            asyncio.run(_calibrate(args))
            return 0
        report = asyncio.run(_measure(args))
        if args.output is not None:
            paths = report.write(args.output)
            print(f"written: {', '.join(map(str, paths))}")
    except LoadError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"{PROGRAM}: --output {args.output}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    except RuntimeError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0 if any(run.summary["num_ok"] for run in report.runs) else 1


async def _measure(args: argparse.Namespace) -> Report:
    """Prints each run's table as it ends. Raises LoadError, RuntimeError."""
    loads, slos, target = loads_of(args), slos_of(args), Target.parse(args.target)
    sources = sources_of(args.metrics, target)
    notes = [note for load in loads[:1] for note in workload_of(load).notes]
    if args.output is not None:
        check_writable(args.output)
    model = await probe(target, args.model)
    loads = [_of_model(load, model, args) for load in loads]
    for load in loads:
        _check_lengths(load, model)
    await _warm_up(loads[0], args.warm_up)
    for note in notes:
        print(f"note: {note}")
    environment = describe_environment()
    runs = []
    for load in loads:
        runs.append(await _run(load, slos, args.clients, sources))
        print(Report("", {}, runs[-1:]).text(), end="\n\n", flush=True)
    facts = {"target": str(target), "model": model.name, "clients": str(args.clients)}
    facts |= {"when": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()), **_told(loads[0])}
    return Report(f"Load on {target}", facts | environment, runs, tuple(notes))


def _of_model(load: Load, model: ModelFacts, args: argparse.Namespace) -> Load:
    vocab_size = args.vocab_size or model.vocab_size or load.vocab_size
    return replace(load, model=model.name, vocab_size=vocab_size)


def _check_lengths(load: Load, model: ModelFacts) -> None:
    num_tokens = longest(workload_of(load), load)
    if model.max_model_len is not None and num_tokens > model.max_model_len:
        raise LoadError(
            f"the longest request needs {num_tokens:,} tokens, and {model.name} takes"
            f" {model.max_model_len:,}: {_shortening(load)} make it fit"
        )


def _shortening(load: Load) -> str:
    """The flags that would do it."""
    if load.trace is not None:
        return "--max-prompt, --max-output and --length-scale"
    turns = "--turns, " if load.num_turns > 1 else ""
    return f"{turns}--prompt-tokens and --output-tokens"


async def _warm_up(load: Load, num_requests: int) -> None:
    """Lets the target connect, compile and allocate what it does at first use. Raises LoadError
    when it cannot answer."""
    if not num_requests:
        return
    few = load.in_turn(num_requests, num_streams=1, output_tokens=_WARM_UP_OUTPUT)
    few = replace(few, prompt_tokens=str(_WARM_UP_PROMPT), num_turns=1, num_prefixes=0)
    for sample in (await run_load(few)).samples:
        if sample.status != OK:
            problem = f"{sample.status}: {sample.detail}"
            raise LoadError(f"--target {load.target}: the first request failed: {problem}")


async def _run(
    load: Load, slos: Sequence[Slo], num_processes: int, sources: Sequence[Source]
) -> Run:
    metrics = await before(sources)
    offered = await run_load(load, num_processes)
    check = await metrics.check(offered.samples)
    if not offered.samples:
        raise LoadError("no request was planned: a longer --duration, or a higher --rate")
    rate = None if load.is_closed or load.arrivals == "trace" else load.rate
    return Run(_label(load), rate, summarise(offered, slos), offered.samples, check)


def _label(load: Load) -> str:
    if load.is_closed:
        return f"{load.num_streams} streams"
    if load.arrivals == "trace":
        return f"trace, times x {load.time_scale:g}"
    return f"{load.arrivals} {load.rate:g}/s"


def _told(load: Load) -> dict[str, str]:
    """The fields of the load that are not the default."""
    default = asdict(Load(load.target))
    named = {field.name: getattr(load, field.name) for field in fields(load)}
    return {name: str(value) for name, value in named.items() if value != default[name]} | {
        "prompt_tokens": load.prompt_tokens,
        "output_tokens": load.output_tokens,
    }


async def _calibrate(args: argparse.Namespace) -> None:
    """Raises LoadError, RuntimeError."""
    scheme = args.target.partition("://")[0]
    if scheme not in ("grpc", "http"):
        raise LoadError("--calibrate: --target must begin with grpc:// or http://")
    found = [
        await calibrate(
            scheme,
            num_processes=args.clients,
            prompt_tokens=_CALIBRATION_PROMPT,
            output_tokens=output_tokens,
        )
        for output_tokens in _CALIBRATION_OUTPUTS
    ]
    print(text_table(*_capacity_table(found)))
    print(
        f"{args.clients} generator process(es) against a null server on the same machine, one"
        " token a message;\nthe last column is what a generator would carry with a core of its own"
    )


def _capacity_table(found: Sequence[Capacity]) -> tuple[list[str], list[list[str]]]:
    head = ["tokens/answer", "requests/s", "tokens/s", "cores", "CPU us/token", "tokens/s a core"]
    rows = [
        [
            f"{one.output_tokens} over {one.scheme}",
            f"{one.requests_per_s:.0f}",
            f"{one.tokens_per_s:.0f}",
            f"{one.cpu:.2f}",
            f"{one.cpu_us_per_token:.1f}",
            f"{one.tokens_per_core_s:.0f}",
        ]
        for one in found
    ]
    return head, rows


if __name__ == "__main__":
    sys.exit(run())
