"""The gateway process: flags, start and end. Knows nothing of torch."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

import uvloop

from baton.services.gateway.chat_format import ChatFormat
from baton.services.gateway.cluster import Cluster
from baton.services.gateway.constraints import ConstraintChecker
from baton.services.gateway.drain import drain
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.generation_config import SOURCES, read_default_sampling
from baton.services.gateway.openai.app import build_app
from baton.services.gateway.openai.cors import allow_origins, origins
from baton.services.gateway.openai.endpoint import HttpEndpoint
from baton.services.gateway.own_model import Interrupted, own_digest
from baton.services.gateway.router import LocalPrefill
from baton.services.gateway.served_model import ServedModel
from baton.services.gateway.server import InferenceServicer
from baton.services.gateway.tokenizer import TextCodec
from baton.shared.answer_formats import AUTO, REASONING_FORMATS, TOOL_FORMATS
from baton.shared.directory.directory import DirectoryMisconfigured
from baton.shared.engine.config import LOAD_FORMATS
from baton.shared.metrics import MetricsServer, add_metrics_flag
from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.info import ModelInfo, load_media_tokens, load_model_info, served_name
from baton.shared.model_files.named import model_dir
from baton.shared.rpc.convert import sampling_to_json
from baton.shared.rpc.flags import Parser, add_flag, add_switch, optional_port
from baton.shared.rpc.serve import PUBLIC_MESSAGE_BYTES, Endpoint, stop_event
from baton.shared.telemetry import Trace, add_log_flags, configure_logging, log_event
from baton.v1 import inference_service_pb2_grpc, types_pb2

logger = logging.getLogger("gateway")

_SERVICE = "baton.v1.InferenceService"
_READY_POLL_S = 0.05


_DESCRIPTION = """\
One gateway: it takes requests over gRPC and HTTP, finds workers for them in the directory, and
makes text of their tokens. It needs the model directory for config and tokenizer; weights need not
be there. `baton up` starts one by itself. Every flag may be given as the variable behind it. The
pages docs/operations.md and docs/gateway.md say more.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m baton.services.gateway", description=_DESCRIPTION)
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
        help="what requests call the model; default: its directory's name",
    )
    add_flag(
        parser,
        "--load-format",
        type=str,
        default="auto",
        choices=LOAD_FORMATS,
        help="as the workers were given: dummy takes only workers with random weights",
    )
    add_flag(
        parser,
        "--redis-url",
        type=str,
        default="redis://127.0.0.1:6379/0",
        help="the directory's Redis or Valkey",
    )
    add_flag(parser, "--cluster", type=str, default="default", help="name of the cluster in it")
    add_flag(parser, "--host", type=str, default="127.0.0.1", help="address to listen on")
    add_flag(parser, "--port", type=int, default=50051, help="port to listen on; 0 picks one")
    add_flag(
        parser,
        "--http-port",
        type=optional_port,
        help="port of HTTP; 0 picks one; default: none",
    )
    add_flag(parser, "--http-host", type=str, help="address of HTTP; default: that of --host")
    add_flag(
        parser,
        "--cors-allow-origin",
        type=origins,
        metavar="ORIGIN[,ORIGIN]",
        help="web pages that may ask over HTTP, such as https://app.example; *: all; default: none",
    )
    add_switch(parser, "--reuse-port", help="share the ports with other gateways of this host")
    add_flag(
        parser,
        "--connection-age-s",
        type=float,
        default=10.0,
        help="with shared ports: seconds until gRPC clients connect anew; a drain takes as long",
    )
    add_switch(parser, "--reflection", help="serve gRPC reflection")
    add_flag(
        parser,
        "--generation-config",
        type=str,
        default="auto",
        choices=SOURCES,
        help="auto: sampling fields that a request does not set are those of the model's "
        "generation_config.json; none: that file does not count",
    )
    add_flag(
        parser,
        "--tool-format",
        type=str,
        default=AUTO,
        choices=TOOL_FORMATS,
        help="how the model writes calls of tools; auto: as its chat template has them; none: "
        "requests with tools are refused",
    )
    add_flag(
        parser,
        "--reasoning-format",
        type=str,
        default=AUTO,
        choices=REASONING_FORMATS,
        help="how the model writes its reasoning; auto: as its chat template has it; none: it is "
        "content",
    )
    add_flag(
        parser,
        "--local-prefill-tokens",
        type=int,
        help="queue of a prefill worker, in prompt tokens, from which on a partner of role both "
        "computes a prompt by itself; default: never",
    )
    add_flag(
        parser,
        "--local-prefill-share",
        type=float,
        default=0.25,
        help="the partner's own queue of prompts, at most, as a share of that one",
    )
    add_flag(
        parser,
        "--late-after-s",
        type=float,
        help="with --local-prefill-tokens: prompts for which neither has room are held here, and "
        "those held for longer go after all others; default: nothing is held",
    )
    add_flag(
        parser,
        "--trace-dir",
        type=Path,
        help="folder to write a trace of requests to; default: none is written",
    )
    add_flag(
        parser,
        "--drain-s",
        type=float,
        default=30.0,
        help="seconds that running answers get at SIGTERM",
    )
    add_metrics_flag(parser)
    add_log_flags(parser)
    args = parser.parse_args(argv)
    args.model_name = args.model_name or served_name(args.model)
    try:
        args.local_prefill = _local_prefill(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _local_prefill(args: argparse.Namespace) -> LocalPrefill | None:
    """Raises ValueError."""
    if args.local_prefill_tokens is not None:
        return LocalPrefill(args.local_prefill_tokens, args.local_prefill_share, args.late_after_s)
    if args.late_after_s is not None:
        raise ValueError("--late-after-s needs --local-prefill-tokens")
    return None


def main() -> int:
    """The process's exit code."""
    args = parse_args()
    configure_logging(
        "gateway", role="gateway", log_format=args.log_format, log_level=args.log_level
    )
    try:
        model = load_model_info(args.model)
        media_tokens = load_media_tokens(args.model)
        codec = TextCodec.load(args.model)
        default_sampling = types_pb2.SamplingParams()
        if args.generation_config == "auto":
            default_sampling = read_default_sampling(args.model, model.vocab_size)
    except ModelError as error:
        sys.stderr.write(f"baton gateway: {error}\n")
        return 2
    return uvloop.run(serve(args, model, codec, default_sampling, media_tokens))


async def serve(
    args: argparse.Namespace,
    model: ModelInfo,
    codec: TextCodec | None,
    default_sampling: types_pb2.SamplingParams,
    media_tokens: Mapping[int, str],
) -> int:
    """Until a signal; returns the exit status."""
    stop = stop_event()
    if default_sampling.ListFields():
        log_event(
            logger,
            logging.INFO,
            "sampling defaults of generation_config.json apply",
            **sampling_to_json(default_sampling),
        )
    incarnation = secrets.token_hex(16)
    served = ServedModel(args.model_name, model.vocab_size)
    cluster = Cluster(
        args.redis_url,
        args.cluster,
        incarnation=incarnation,
        model=model,
        served=served,
        local_prefill=args.local_prefill,
        media_tokens=media_tokens,
    )
    constraints = ConstraintChecker(args.model, model.vocab_size)
    trace = Trace(args.trace_dir, f"gateway-{incarnation[:8]}")
    frontend = Frontend(
        cluster,
        codec,
        check_constraint=constraints.check,
        model=model,
        model_name=args.model_name,
        incarnation=incarnation,
        default_sampling=default_sampling,
        chat_format=_chat_format(args, codec),
        trace=trace,
    )
    connection_age_s = args.connection_age_s if args.reuse_port else None
    endpoint = Endpoint(
        max_message_bytes=PUBLIC_MESSAGE_BYTES,
        with_reflection=args.reflection,
        reuse_port=args.reuse_port,
        connection_age_s=connection_age_s,
    )
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceServicer(frontend), endpoint.server
    )
    http = None
    if args.http_port is not None:
        app = allow_origins(build_app(frontend), args.cors_allow_origin)
        http = HttpEndpoint(app, on_refused=frontend.metrics.http_refused)
    metrics = None
    try:
        if args.metrics_port is not None:
            metrics = MetricsServer(
                args.host,
                args.metrics_port,
                frontend.metrics.registry,
                is_ready=lambda: cluster.has_route() and not frontend.is_leaving,
            )
        workers = await cluster.registered()
        digest = await own_digest(args.model, args.load_format, workers, stop)
        if digest is not None:
            served.has_weights(digest)
        await cluster.connect()
        # First: what cannot listen fails before anybody can ask the other.
        if http is not None:
            http_host = args.http_host or args.host
            await http.start(http_host, args.http_port, reuse_port=args.reuse_port)
        await endpoint.start(args.host, args.port, [_SERVICE])
    except (DirectoryMisconfigured, OSError, Interrupted) as error:
        if not isinstance(error, Interrupted):
            sys.stderr.write(f"baton gateway: {error}\n")
        if http is not None:
            await http.stop()
        if metrics is not None:
            metrics.close()
        await cluster.close()
        return 0 if isinstance(error, Interrupted) else 2
    # What is there now stays: all streams would wait a tenth of a second for a look through it.
    gc.collect()
    gc.freeze()
    following = asyncio.create_task(cluster.follow())
    following.add_done_callback(lambda _: stop.set())
    readiness = asyncio.create_task(_follow_readiness(cluster, endpoint))
    http_address = "" if http is None else f" http={http.address}"
    metrics_address = "" if metrics is None else f" metrics={metrics.address}"
    print(f"READY grpc={endpoint.address}{http_address}{metrics_address}", flush=True)  # noqa: T201

    await stop.wait()
    has_failed = following.done()
    if has_failed and not following.cancelled():
        log_event(
            logger, logging.ERROR, "the directory can't be used", message=following.exception()
        )
    readiness.cancel()
    await drain(frontend, endpoint, http, shared_for_s=connection_age_s, limit_s=args.drain_s)
    following.cancel()
    await asyncio.gather(following, readiness, return_exceptions=True)
    await constraints.close()
    await cluster.close()
    if metrics is not None:
        metrics.close()
    trace.close()
    return 1 if has_failed else 0


def _chat_format(args: argparse.Namespace, codec: TextCodec | None) -> ChatFormat:
    if codec is None:
        return ChatFormat()
    chosen = ChatFormat.choose(
        codec.chat_template,
        codec.special_ids,
        token_id=codec.token_id,
        tools=args.tool_format,
        reasoning=args.reasoning_format,
    )
    log_event(
        logger,
        logging.INFO,
        "formats of answers to chats",
        tools=chosen.tools,
        reasoning=chosen.reasoning,
    )
    return chosen


async def _follow_readiness(cluster: Cluster, endpoint: Endpoint) -> None:
    """SERVING as long as a request would find a route."""
    was_ready = None
    while True:
        is_ready = cluster.has_route()
        if is_ready is not was_ready:
            await endpoint.set_ready(is_ready=is_ready)
            was_ready = is_ready
        await asyncio.sleep(_READY_POLL_S)
