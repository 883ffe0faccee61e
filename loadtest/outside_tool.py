"""Do others measure what we measure? guidellm or aiperf and our generator at one endpoint, in turn.

    python3 -m venv /tmp/tool && /tmp/tool/bin/pip install torch==2.13.0 guidellm==0.8.1
    python -m baton.loadtest.outside_tool --tool guidellm --bin /tmp/tool/bin/guidellm \\
        --target http://127.0.0.1:8000 --tokenizer models/demo

The same closed loop each time: ours, theirs, ours again. On a machine that the server shares with
them, a tool's own work slows the server; `--null MS` puts a server in its place that sends a token
each MS ms, whatever the tool does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.loadtest.calibrate import null_server
from baton.loadtest.environment import describe_environment
from baton.loadtest.page import text_table
from baton.loadtest.run import run_load
from baton.loadtest.samples import summarise
from baton.loadtest.spec import Load, LoadError
from baton.loadtest.target import Target, probe
from baton.shared.interrupt import exit_code

_LIMIT_S = 300.0
_END_S = 5.0
_PERCENTILES = ("mean", "p50", "p99")
_TIMES = ("ttft_ms", "tpot_ms", "e2e_ms")
Figures = dict[str, float]


@dataclass(frozen=True)
class Closed:
    """The closed loop that all of them offer."""

    target: str
    model: str
    tokenizer: Path
    num_streams: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Tool:
    """`command` from the program, the loop and a scratch directory; `figures` from that."""

    command: Callable[[str, Closed, Path], list[str]]
    figures: Callable[[Path], Figures]
    is_offline: bool = True
    """Whether it accepts a directory as tokenizer when the hub library is offline."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        result = asyncio.run(_compare(args))
    except (LoadError, RuntimeError) as error:
        print(f"outside tool: {error}", file=sys.stderr)
        return 2
    runs: dict[str, Figures] = result["runs"]
    rows = [
        [name, *(f"{run[name]:.1f}" for run in runs.values())] for name in next(iter(runs.values()))
    ]
    print(text_table(["", *runs], rows))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


async def _compare(args: argparse.Namespace) -> dict[str, Any]:
    """Raises LoadError, RuntimeError."""
    if args.null is None:
        return await _compare_at(args, args.target)
    async with null_server("http", gap_ms=args.null) as target:
        return await _compare_at(args, target)


async def _compare_at(args: argparse.Namespace, target: str) -> dict[str, Any]:
    model = await probe(Target.parse(target))
    loop = Closed(
        target,
        model.name,
        args.tokenizer.resolve(),
        args.streams,
        args.requests,
        args.prompt_tokens,
        args.output_tokens,
    )
    environment = describe_environment()
    runs = {"ours": await _ours(loop, seed=1)}
    runs[args.tool] = await _theirs(TOOLS[args.tool], args.bin, loop)
    runs["ours again"] = await _ours(loop, seed=2)
    what = {"null_gap_ms": args.null, **vars(loop), "tokenizer": loop.tokenizer.name}
    return {"loop": what, "environment": environment, "runs": runs}


async def _ours(loop: Closed, seed: int) -> Figures:
    load = Load(
        loop.target,
        prompt_tokens=str(loop.prompt_tokens),
        output_tokens=str(loop.output_tokens),
        num_streams=loop.num_streams,
        num_requests=loop.num_requests,
        model=loop.model,
        # No prompt that a cache may hold, because another run has asked it.
        seed=os.getpid() * 10 + seed,
    )
    summary = summarise(await run_load(load), [])
    if summary["num_ok"] != loop.num_requests:
        raise RuntimeError(f"our requests failed: {summary['problems']}")
    times = {
        f"{name} {column}": summary[name][column] for name in _TIMES for column in _PERCENTILES
    }
    return times | {
        "requests/s": summary["requests_per_s"],
        "output tokens/s": summary["output_tokens_per_s"],
    }


async def _theirs(tool: Tool, program: str, loop: Closed) -> Figures:
    """Raises RuntimeError with the tool's last words."""
    with tempfile.TemporaryDirectory() as scratch:
        command = tool.command(program, loop, Path(scratch))
        print(" ".join(command), flush=True)
        try:
            async with asyncio.timeout(_LIMIT_S):
                returncode, said = await _run(command, _environment(tool))
            if returncode:
                raise RuntimeError(f"{program}: {said.strip()[-600:]}")
            return tool.figures(Path(scratch))
        except TimeoutError:
            raise RuntimeError(f"{program}: no end within {_LIMIT_S:g} s") from None
        except (OSError, KeyError, ValueError) as error:
            raise RuntimeError(f"{program}: {error!r}") from None


async def _run(command: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
    """The exit code, and what the tool wrote: to standard error, if it wrote there at all. When
    this is cancelled, the tool is ended. Raises OSError."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            # The tools start processes of their own: they are ended as one group.
            start_new_session=True,
        )
    )
    try:
        # Cancelled in between, asyncio would end the tool and not what that has started already.
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        await _end(await starting)
        raise
    try:
        out, err = await process.communicate()
        return process.returncode or 0, (err or out).decode(errors="replace")
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError, TimeoutError):
        os.killpg(process.pid, signal.SIGTERM)
        await asyncio.wait_for(process.wait(), _END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _environment(tool: Tool) -> dict[str, str]:
    """An environment in which it finds its own packages, not this tree's."""
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    return own | ({"HF_HUB_OFFLINE": "1"} if tool.is_offline else {})


def _guidellm_command(program: str, loop: Closed, scratch: Path) -> list[str]:
    backend = f"kind=openai_http,target={loop.target},model={loop.model}"
    lengths = f"prompt_tokens={loop.prompt_tokens},output_tokens={loop.output_tokens}"
    return [
        *(program, "run", "--backend", f"{backend},request_format=/v1/completions"),
        *("--profile", f"kind=concurrent,streams={loop.num_streams}"),
        *("--constraint", f"kind=max_requests,count={loop.num_requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={loop.tokenizer}"),
        *("--data", f"kind=synthetic_text,{lengths}"),
        *("--output", f"kind=json,path={scratch / 'benchmarks.json'}", "--disable-progress"),
    ]


def _guidellm_figures(scratch: Path) -> Figures:
    """What it calls inter-token latency is TPOT here."""
    metrics = json.loads((scratch / "benchmarks.json").read_text())["benchmarks"][0]["metrics"]
    found: Figures = {}
    for name, theirs, scale in (
        ("ttft_ms", "time_to_first_token_ms", 1.0),
        ("tpot_ms", "inter_token_latency_ms", 1.0),
        ("e2e_ms", "request_latency", 1e3),
    ):
        seen = metrics[theirs]["successful"]
        values = {"mean": seen["mean"], **seen["percentiles"]}
        found |= {f"{name} {column}": scale * values[column] for column in _PERCENTILES}
    return found | {
        "requests/s": metrics["requests_per_second"]["successful"]["mean"],
        "output tokens/s": metrics["output_tokens_per_second"]["successful"]["mean"],
    }


def _aiperf_command(program: str, loop: Closed, scratch: Path) -> list[str]:
    return [
        *(program, "profile", "--model", loop.model, "--url", loop.target),
        *("--endpoint-type", "completions", "--streaming", "--extra-inputs", "ignore_eos:true"),
        *("--tokenizer", str(loop.tokenizer), "--use-server-token-count"),
        *("--synthetic-input-tokens-mean", str(loop.prompt_tokens)),
        *("--output-tokens-mean", str(loop.output_tokens)),
        *("--request-count", str(loop.num_requests), "--concurrency", str(loop.num_streams)),
        *("--artifact-dir", str(scratch), "--ui", "none", "--no-gpu-telemetry"),
    ]


def _aiperf_figures(scratch: Path) -> Figures:
    """What it calls inter-token latency is TPOT here."""
    metrics = json.loads((scratch / "profile_export_aiperf.json").read_text())
    columns = {"mean": "avg", "p50": "p50", "p99": "p99"}
    found = {
        f"{name} {column}": metrics[theirs][columns[column]]
        for name, theirs in (
            ("ttft_ms", "time_to_first_token"),
            ("tpot_ms", "inter_token_latency"),
            ("e2e_ms", "request_latency"),
        )
        for column in _PERCENTILES
    }
    return found | {
        "requests/s": metrics["request_throughput"]["avg"],
        "output tokens/s": metrics["output_token_throughput"]["avg"],
    }


TOOLS = {
    "guidellm": Tool(_guidellm_command, _guidellm_figures),
    "aiperf": Tool(_aiperf_command, _aiperf_figures, is_offline=False),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m baton.loadtest.outside_tool", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--tool", choices=TOOLS, required=True)
    add("--bin", help="its program; default: its name")
    add("--target", default="http://127.0.0.1:8000")
    add("--null", type=float, metavar="MS", help="a null server instead, a token each MS ms")
    add("--tokenizer", type=Path, default=Path("models/demo"), help="directory, for its prompts")
    add("--streams", type=int, default=4)
    add("--requests", type=int, default=80)
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=32)
    add("--output", type=Path, help="JSON")
    args = parser.parse_args(argv)
    args.bin = args.bin or args.tool
    return args


if __name__ == "__main__":
    sys.exit(exit_code(main))
