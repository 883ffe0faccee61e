"""A worker process: flags, start and end."""

from __future__ import annotations

import argparse
import logging
import math
import os
import secrets
import sys
import threading
from pathlib import Path

import uvloop

from baton.shared.engine.config import (
    DEVICES,
    DTYPES,
    KERNELS,
    KV_CACHE_DTYPE_HELP,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    MODEL_IMPL_HELP,
    MODEL_IMPLS,
    QUANTIZATION_HELP,
    QUANTIZATIONS,
    EngineConfig,
)
from baton.shared.metrics import MetricsServer, add_metrics_flag, new_registry
from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.info import served_name
from baton.shared.model_files.named import model_dir
from baton.shared.rpc.flags import Parser, add_flag, add_switch, length_or_auto
from baton.shared.speculation import (
    DRAFT_MODEL,
    DRAFT_MODEL_HELP,
    HELP,
    METAVAR,
    MTP,
    speculation,
    why_not_together,
)
from baton.shared.telemetry import add_log_flags, configure_logging

logger = logging.getLogger("worker")


_DESCRIPTION = """\
One worker: it holds a model and its blocks, and computes. Of role prefill it computes prompts, of
role decode answers, of role both either. `baton up` starts workers by itself; start them so across
machines, and on several GPUs. Every flag may be given as the variable behind it. The pages
docs/operations.md and docs/engine.md say more.
"""


def parse_args(argv: list[str] | None = None, *, role: str | None = None) -> argparse.Namespace:
    """`role`: of a program that has one role only, and no flag for it."""
    if role is None:
        prog, description = "python -m baton.services.worker", _DESCRIPTION
    else:
        prog, description = f"python -m baton.services.{role}", f"A worker of role {role}."
    parser = Parser(prog=prog, description=description)
    if role is None:
        add_flag(
            parser,
            "--role",
            type=str,
            choices=("prefill", "decode", "both"),
            required=True,
            help="which services this worker hosts",
        )
    else:
        parser.set_defaults(role=role)
    add_flag(
        parser,
        "--model",
        type=model_dir,
        required=True,
        help="model directory, GGUF file, or the name of a model that was fetched",
    )
    add_flag(
        parser,
        "--model-name",
        type=str,
        help="what metrics call the model; default: its directory's name",
    )
    add_flag(
        parser,
        "--redis-url",
        type=str,
        default="redis://127.0.0.1:6379/0",
        help="the directory's Redis or Valkey",
    )
    add_flag(parser, "--cluster", type=str, default="default", help="name of the cluster in it")
    add_flag(parser, "--worker-id", type=str, help="stable name; default: role and a random part")
    add_flag(parser, "--host", type=str, default="127.0.0.1", help="address to listen on")
    add_flag(parser, "--advertise", type=str, help="host that peers reach it by; default: --host")
    add_flag(parser, "--port", type=int, default=0, help="port to listen on; 0 picks one")
    add_flag(
        parser,
        "--device",
        type=str,
        default="auto",
        choices=DEVICES,
        help="where to compute",
    )
    add_flag(
        parser,
        "--dtype",
        type=str,
        default="auto",
        choices=DTYPES,
        help="of activations and cache; auto: float32 on a CPU, bfloat16 on a GPU",
    )
    add_flag(
        parser,
        "--kernels",
        type=str,
        default="auto",
        choices=KERNELS,
        help="what to compute with; auto: Triton on a GPU; on a CPU the torch reference, and in "
        "bfloat16, with a C compiler, C that is compiled at start",
    )
    add_flag(
        parser,
        "--model-impl",
        type=str,
        default="auto",
        choices=MODEL_IMPLS,
        help=MODEL_IMPL_HELP,
    )
    add_flag(
        parser,
        "--quantization",
        type=str,
        default=None,
        choices=QUANTIZATIONS,
        help=QUANTIZATION_HELP,
    )
    add_flag(
        parser,
        "--kv-cache-dtype",
        type=str,
        default="auto",
        choices=KV_CACHE_DTYPES,
        help=KV_CACHE_DTYPE_HELP,
    )
    add_flag(
        parser,
        "--load-format",
        type=str,
        default="auto",
        choices=LOAD_FORMATS,
        help="dummy: random weights of the shapes in config.json, to measure with",
    )
    add_flag(
        parser,
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        help="share of the GPU's memory that this worker may take, weights included",
    )
    add_flag(
        parser,
        "--host-memory-mib",
        type=int,
        metavar="N",
        help="host memory that this worker may take on a CPU, weights and pool included; "
        "default: what the machine and its control groups leave free",
    )
    add_switch(parser, "--no-cuda-graphs", help="launch every kernel by itself, to look for faults")
    add_switch(
        parser,
        "--no-prompt-graphs",
        help="capture decode steps only: starts sooner, and short prompts wait for launches",
    )
    add_flag(
        parser,
        "--num-blocks",
        type=int,
        help="blocks of the pool; default: as many as memory has room for",
    )
    add_flag(parser, "--block-size", type=int, default=16, help="tokens of a block")
    add_flag(
        parser,
        "--max-model-len",
        type=length_or_auto,
        metavar="N|auto",
        help="tokens of prompt and answer; auto: the most for which the pool has room; default: "
        "the model's",
    )
    add_flag(
        parser,
        "--token-budget",
        type=int,
        help="tokens of a step, at most; default: 512 on a CPU, measured at start on a GPU",
    )
    add_flag(
        parser,
        "--max-num-seqs",
        type=int,
        help="rows of a step, at most; default: 256, or fewer where layers keep states and memory "
        "holds no more",
    )
    add_flag(
        parser,
        "--state-checkpoints",
        type=int,
        metavar="N",
        help="where layers keep states: how many there is room for beside those of sequences, to "
        "be kept for later prompts; 0: none are kept; default: a quarter of --max-num-seqs, and 0 "
        "for workers of role decode, which compute no prompts",
    )
    add_flag(
        parser,
        "--speculate",
        type=speculation,
        metavar=METAVAR,
        help=f"{HELP}; workers of role prefill decode nothing, and ignore it",
    )
    add_flag(
        parser,
        "--draft-model",
        type=model_dir,
        metavar="DIR",
        help=DRAFT_MODEL_HELP,
    )
    add_flag(
        parser,
        "--tpot-goal-ms",
        type=_positive_ms,
        help="milliseconds a token: prompts wait while streams are slower than that on average, "
        "but for a chunk a second; default: they never wait",
    )
    add_flag(parser, "--threads", type=int, default=1, help="CPU threads of the engine")
    add_flag(
        parser,
        "--transport",
        type=str,
        default="auto",
        choices=("auto", "shm", "nixl"),
        help="how blocks move between workers; auto: shm between CPUs, nixl between GPUs",
    )
    add_flag(
        parser,
        "--shm-dir",
        type=Path,
        default=Path("/dev/shm"),
        help="folder of the pools of CPU workers",
    )
    add_flag(
        parser,
        "--trace-dir",
        type=Path,
        help="folder to write a trace of events to; default: none is written",
    )
    add_flag(
        parser,
        "--drain-s",
        type=float,
        default=30.0,
        help="seconds that running answers get at SIGTERM",
    )
    add_flag(
        parser,
        "--kernel-cache-dir",
        type=Path,
        help="folder that keeps compiled GPU kernels from start to start, as a volume of a "
        "container; default: Triton's own, in the home folder",
    )
    add_metrics_flag(parser)
    add_log_flags(parser)
    args = parser.parse_args(argv)
    args.model_name = args.model_name or served_name(args.model)
    args.worker_id = args.worker_id or f"{args.role}-{secrets.token_hex(4)}"
    if problem := why_not_together(args.speculate, args.draft_model):
        parser.error(problem)
    if args.role == "prefill":
        args.speculate = args.draft_model = None
    if args.role == "decode" and args.state_checkpoints is None:
        args.state_checkpoints = 0
    args.tpot_goal_s = None if args.tpot_goal_ms is None else args.tpot_goal_ms / 1e3
    return args


def _positive_ms(text: str) -> float:
    milliseconds = float(text)
    if not 0 < milliseconds < math.inf:
        raise argparse.ArgumentTypeError("must be milliseconds above 0")
    return milliseconds


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    is_mtp = args.speculate is not None and args.speculate.kind == MTP
    return EngineConfig(
        model_dir=args.model,
        device=args.device,
        dtype=args.dtype,
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        max_model_len=args.max_model_len,
        token_budget=args.token_budget,
        max_num_seqs=args.max_num_seqs,
        state_checkpoints=args.state_checkpoints,
        kernels=args.kernels,
        model_impl=args.model_impl,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        load_format=args.load_format,
        gpu_memory_utilization=args.gpu_memory_utilization,
        host_memory_mib=args.host_memory_mib,
        cuda_graphs=not args.no_cuda_graphs,
        prompt_graphs=not args.no_prompt_graphs,
        num_drafts=args.speculate.num_drafts if args.speculate is not None else 0,
        # Whose checkpoint has what guesses.
        draft_model_dir=args.model if is_mtp else args.draft_model,
        draft_kind=DRAFT_MODEL if args.speculate is None else args.speculate.kind,
    )


def keep_kernels(cache_dir: Path | None) -> None:
    """Before anything is compiled. ModelError: the folder cannot be made or written to."""
    if cache_dir is None:
        return
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        is_usable = os.access(cache_dir, os.W_OK | os.X_OK)
    except OSError as error:
        raise ModelError(f"kernel_cache_dir: {cache_dir}: {error.strerror}") from None
    if not is_usable:
        raise ModelError(f"kernel_cache_dir: {cache_dir} cannot be written to")
    os.environ["TRITON_CACHE_DIR"] = str(cache_dir.resolve())


def main(*, role: str | None = None) -> int:
    """The process's exit code. `role`: as of `parse_args`."""
    args = parse_args(role=role)
    configure_logging(
        args.worker_id, role=args.role, log_format=args.log_format, log_level=args.log_level
    )
    registry, ready, metrics_address = new_registry(), threading.Event(), None
    try:
        if args.metrics_port is not None:
            # Before the model is loaded: whoever probes this port learns that it is alive.
            metrics = MetricsServer(args.host, args.metrics_port, registry, ready.is_set)
            metrics_address = metrics.address
        # After the flags, so that --help and usage errors don't wait for torch.
        from baton.services.worker.worker import Worker, WorkerStartError
    except OSError as error:
        sys.stderr.write(f"baton worker: {error}\n")
        return 2
    try:
        keep_kernels(args.kernel_cache_dir)
        worker = Worker(
            args,
            _engine_config(args),
            registry=registry,
            ready=ready,
            metrics_address=metrics_address,
        )
    except (ModelError, WorkerStartError) as error:
        sys.stderr.write(f"baton worker: {error}\n")
        return 2
    return uvloop.run(worker.run())
