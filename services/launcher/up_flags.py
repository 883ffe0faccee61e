"""The flags of `baton up`, and the stack that they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.services.launcher.flag_types import count, port, positive, seconds, utf8
from baton.services.launcher.roles import DEFAULT_HTTP_PORT, RoleCounts, StackConfig
from baton.shared.answer_formats import REASONING_FORMATS, TOOL_FORMATS
from baton.shared.engine.config import (
    KV_CACHE_DTYPE_HELP,
    KV_CACHE_DTYPES,
    MODEL_IMPL_HELP,
    MODEL_IMPLS,
    QUANTIZATION_HELP,
    QUANTIZATIONS,
)
from baton.shared.model_files.named import model_dir
from baton.shared.rpc.flags import add_flag, add_switch, length_or_auto, optional_port
from baton.shared.speculation import DRAFT_MODEL_HELP, HELP, METAVAR, speculation

UP_HELP = """\
Starts every role on this machine, each as its own process, and prints one line

    READY grpc=HOST:PORT http=HOST:PORT

when a request has been answered. SIGTERM or Ctrl-C drains; once more kills. A role that dies is
reported and started again. Without --prefill, --decode and --both: one prefill, one decode.

What a worker or the gateway takes beyond these flags is passed on through the environment
(BATON_TOKEN_BUDGET=1024, say; see python -m baton.services.worker --help, or .gateway --help).
`baton models DIR` tells before the start what a model needs. More is in docs/operations.md.
"""


def add_up_flags(parser: argparse.ArgumentParser) -> None:
    defaults = StackConfig(model_dir=Path(), counts=RoleCounts(0, 0, 0))
    add_flag(
        parser,
        "--model",
        type=model_dir,
        required=True,
        metavar="DIR",
        help="model directory, GGUF file, or the name of a model that was fetched (baton fetch)",
    )
    add_flag(
        parser,
        "--model-name",
        type=utf8,
        metavar="NAME",
        help="what requests call the model; default: its directory's name",
    )
    workers = parser.add_argument_group("workers")
    for role in ("prefill", "decode", "both"):
        add_flag(workers, f"--{role}", type=count, metavar="N", help=f"workers of role {role}")
    add_flag(
        workers,
        "--device",
        type=str,
        default=defaults.device,
        choices=("auto", "cpu", "cuda"),
        help="where workers compute",
    )
    add_flag(
        workers,
        "--dtype",
        type=str,
        default=defaults.dtype,
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of activations and cache; auto: float32 on a CPU, bfloat16 on a GPU",
    )
    add_flag(
        workers,
        "--model-impl",
        type=str,
        default=defaults.model_impl,
        choices=MODEL_IMPLS,
        help=MODEL_IMPL_HELP,
    )
    add_flag(
        workers,
        "--quantization",
        type=str,
        default=defaults.quantization,
        choices=QUANTIZATIONS,
        help=QUANTIZATION_HELP,
    )
    add_flag(
        workers,
        "--kv-cache-dtype",
        type=str,
        default=defaults.kv_cache_dtype,
        choices=KV_CACHE_DTYPES,
        help=KV_CACHE_DTYPE_HELP,
    )
    add_flag(
        workers,
        "--num-blocks",
        type=positive,
        metavar="N",
        help="blocks of each worker's pool; default: as many as memory has room for",
    )
    add_flag(
        workers,
        "--block-size",
        type=positive,
        default=defaults.block_size,
        metavar="N",
        help="tokens of a block",
    )
    add_flag(
        workers,
        "--max-model-len",
        type=length_or_auto,
        metavar="N|auto",
        help="tokens of prompt and answer; auto: the most for which each worker's pool has room; "
        "default: the model's",
    )
    add_flag(workers, "--speculate", type=speculation, metavar=METAVAR, help=HELP)
    add_flag(
        workers,
        "--draft-model",
        type=model_dir,
        metavar="DIR",
        help=DRAFT_MODEL_HELP,
    )
    gateway = parser.add_argument_group("gateway")
    add_flag(gateway, "--host", type=str, default=defaults.host, help="address to listen on")
    add_flag(
        gateway,
        "--port",
        type=port,
        default=defaults.port,
        metavar="N",
        help="port to listen on; 0 picks a free one",
    )
    add_flag(
        gateway,
        "--http-port",
        type=optional_port,
        default=DEFAULT_HTTP_PORT,
        metavar="N",
        help="port of HTTP (OpenAI, Anthropic); 0 picks a free one, none is without",
    )
    add_flag(
        gateway,
        "--gateways",
        type=positive,
        default=defaults.num_gateways,
        metavar="N",
        help="gateways behind these ports",
    )
    add_flag(
        gateway,
        "--drain-s",
        type=seconds,
        default=defaults.drain_s,
        metavar="S",
        help="seconds that running answers get at SIGTERM",
    )
    add_flag(
        gateway,
        "--cors-allow-origin",
        type=str,
        metavar="ORIGIN[,ORIGIN]",
        help="web pages that may ask over HTTP, such as https://app.example; *: all; default: none",
    )
    add_switch(gateway, "--reflection", help="serve gRPC reflection")
    add_flag(
        gateway,
        "--generation-config",
        type=str,
        choices=("auto", "none"),
        help="none: the sampling defaults in the model's generation_config.json do not count; "
        "default: auto",
    )
    add_flag(
        gateway,
        "--tool-format",
        type=str,
        choices=TOOL_FORMATS,
        help="how the model writes calls of tools; default: auto, as its chat template has them",
    )
    add_flag(
        gateway,
        "--reasoning-format",
        type=str,
        choices=REASONING_FORMATS,
        help="how the model writes its reasoning; default: auto, as its chat template has it",
    )
    metrics = parser.add_argument_group("metrics")
    add_flag(
        metrics,
        "--metrics-port",
        type=optional_port,
        metavar="N",
        help="ports of /metrics and /health: gateways from N on, then workers; 0: each picks one "
        "and says which; default: none",
    )
    directory = parser.add_argument_group("directory")
    add_flag(
        directory,
        "--redis-url",
        type=str,
        metavar="URL",
        help="Redis or Valkey to use; default: a private Valkey, gone with this process",
    )
    add_flag(
        directory,
        "--cluster",
        type=str,
        default=defaults.cluster,
        metavar="NAME",
        help="separates clusters that share a Redis",
    )


def stack_config(args: argparse.Namespace) -> StackConfig:
    return StackConfig(
        model_dir=args.model,
        model_name=args.model_name,
        counts=RoleCounts.of_flags(args.prefill, args.decode, args.both),
        host=args.host,
        port=args.port,
        http_port=args.http_port,
        num_gateways=args.gateways,
        cors_allow_origin=args.cors_allow_origin,
        device=args.device,
        dtype=args.dtype,
        model_impl=args.model_impl,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        redis_url=args.redis_url,
        cluster=args.cluster,
        num_blocks=args.num_blocks,
        block_size=args.block_size,
        max_model_len=args.max_model_len,
        speculate=args.speculate,
        draft_model_dir=args.draft_model,
        reflection=args.reflection,
        generation_config=args.generation_config,
        tool_format=args.tool_format,
        reasoning_format=args.reasoning_format,
        drain_s=args.drain_s,
        metrics_port=args.metrics_port,
    )
