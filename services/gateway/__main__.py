"""The gateway process: `python -m services.gateway --model DIR ...`. Knows nothing of torch."""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import sys
import time
from pathlib import Path

import uvloop
from baton.v1 import inference_service_pb2_grpc

from services.gateway.cluster import Cluster
from services.gateway.router import LocalPrefill
from services.gateway.server import InferenceServicer
from services.gateway.tokenizer import TextCodec
from shared.directory.directory import DirectoryMisconfigured
from shared.engine.config import ModelConfig, ModelError, load_model_config
from shared.rpc.flags import add_flag, add_switch
from shared.rpc.serve import PUBLIC_MESSAGE_BYTES, Endpoint, is_orphaned, stop_event
from shared.telemetry import configure_logging

logger = logging.getLogger("gateway")

_SERVICE = "baton.v1.InferenceService"
_READY_POLL_S = 0.05
_STOP_GRACE_S = 0.5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.gateway", description=__doc__)
    add_flag(parser, "--model", type=Path, required=True, help="Hugging Face model directory")
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
    add_switch(parser, "--reflection", help="serve gRPC reflection")
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
    add_flag(parser, "--drain-s", type=float, default=30.0, help="time to finish after SIGTERM")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    configure_logging("gateway")
    try:
        model = load_model_config(args.model)
        codec = TextCodec.load(args.model)
    except ModelError as error:
        sys.stderr.write(f"baton gateway: {error}\n")
        return 2
    return uvloop.run(serve(args, model, codec))


async def serve(args: argparse.Namespace, model: ModelConfig, codec: TextCodec | None) -> int:
    """Until a signal; returns the exit status."""
    stop = stop_event()
    incarnation = secrets.token_hex(16)
    local_prefill = None
    if args.local_prefill_tokens is not None:
        local_prefill = LocalPrefill(args.local_prefill_tokens, args.local_prefill_share)
    cluster = Cluster(
        args.redis_url,
        args.cluster,
        incarnation=incarnation,
        model=model,
        local_prefill=local_prefill,
    )
    servicer = InferenceServicer(
        cluster,
        codec,
        model=model,
        model_name=args.model.resolve().name,
        incarnation=incarnation,
    )
    endpoint = Endpoint(max_message_bytes=PUBLIC_MESSAGE_BYTES, with_reflection=args.reflection)
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, endpoint.server)
    try:
        await cluster.connect()
        await endpoint.start(args.host, args.port, [_SERVICE])
    except (DirectoryMisconfigured, OSError) as error:
        sys.stderr.write(f"baton gateway: {error}\n")
        await cluster.close()
        return 2
    following = asyncio.create_task(cluster.follow())
    following.add_done_callback(lambda _: stop.set())
    readiness = asyncio.create_task(_follow_readiness(cluster, endpoint))
    print(f"READY grpc={endpoint.address}", flush=True)  # noqa: T201

    await stop.wait()
    has_failed = following.done()
    if has_failed and not following.cancelled():
        logger.error("the directory can't be used: %s", following.exception())
    readiness.cancel()
    await endpoint.set_ready(is_ready=False)
    servicer.is_draining = True
    give_up_at = time.monotonic() + args.drain_s
    while servicer.num_in_flight and time.monotonic() < give_up_at and not is_orphaned():
        await asyncio.sleep(_READY_POLL_S)
    await endpoint.stop(_STOP_GRACE_S)
    following.cancel()
    await asyncio.gather(following, readiness, return_exceptions=True)
    await cluster.close()
    return 1 if has_failed else 0


async def _follow_readiness(cluster: Cluster, endpoint: Endpoint) -> None:
    """SERVING as long as a request would find a route."""
    was_ready = None
    while True:
        is_ready = cluster.has_route()
        if is_ready is not was_ready:
            await endpoint.set_ready(is_ready=is_ready)
            was_ready = is_ready
        await asyncio.sleep(_READY_POLL_S)


if __name__ == "__main__":
    sys.exit(main())
