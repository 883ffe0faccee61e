"""`baton health`: whether one process is ready, for container health checks and scripts.

Asks the standard service grpc.health.v1, which every role serves: about the empty name, whether the
process lives; about a role's service, whether it would take a request.
"""

from __future__ import annotations

import asyncio
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.services.launcher.target import connect, what_failed

SERVICES = {
    "gateway": "baton.v1.InferenceService",
    "prefill": "baton.v1.PrefillService",
    "decode": "baton.v1.DecodeService",
}


def run_health(target: str, service: str, timeout_s: float) -> int:
    """The exit code: 0 when `service`, by its short or full name, serves at `target`; else 1, and
    one line that says why."""
    name = SERVICES.get(service, service)
    problem = asyncio.run(_problem(target, name, timeout_s))
    if problem is None:
        return 0
    print(f"{target} {name or 'process'}: {problem}", file=sys.stderr)
    return 1


async def _problem(target: str, service: str, timeout_s: float) -> str | None:
    async with connect(target) as channel:
        # Its stub names no methods.
        check = getattr(health_pb2_grpc.HealthStub(channel), "Check")  # noqa: B009
        try:
            answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return what_failed(error, target)
    status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return None if status == "SERVING" else status
