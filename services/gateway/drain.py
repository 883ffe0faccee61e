"""How a gateway leaves.

    not serving ─► alone: new requests are refused
                   behind shared ports: new connections go to the others; requests that still
                   come on old ones are answered, until clients have been told to connect anew
                ─► running answers finish ─► what still runs is told so ─► closed

All of it within a limited time.
"""

from __future__ import annotations

import asyncio
import time

from baton.services.gateway.frontend import Frontend
from baton.services.gateway.openai.endpoint import HttpEndpoint
from baton.shared.rpc.serve import Endpoint, is_orphaned

_POLL_S = 0.05
_LEAVING_POLL_S = 0.2
_LINGER_S = 1.0
"""Without a request, behind shared ports: on a connection that looks idle, one may be on its
way."""
_AGE_MARGIN = 1.2
"""gRPC lets connections grow older by 10 %."""
_STOP_GRACE_S = 0.5


async def drain(
    frontend: Frontend,
    endpoint: Endpoint,
    http: HttpEndpoint | None,
    *,
    shared_for_s: float | None,
    limit_s: float,
) -> None:
    """`shared_for_s`: the age at which clients leave a connection; None for ports of its own."""
    began_at = time.monotonic()
    give_up_at = began_at + limit_s
    await endpoint.set_ready(is_ready=False)
    frontend.is_leaving = True
    if http is not None:
        http.close_after_answers()
    if shared_for_s is None:
        frontend.is_draining = True
        await _until_quiet(frontend, 0.0, give_up_at)
    else:
        endpoint.stop_listening()
        if http is not None:
            await http.stop_accepting()
        # From then on no call can come that gRPC would cancel when it stops.
        left_at = min(began_at + _AGE_MARGIN * shared_for_s, give_up_at)
        while time.monotonic() < left_at and endpoint.has_connections() and not is_orphaned():
            await asyncio.sleep(_LEAVING_POLL_S)
        await _until_quiet(frontend, _LINGER_S, give_up_at)
    frontend.cut_off()
    await _until_quiet(frontend, 0.0, time.monotonic() + _STOP_GRACE_S)
    await endpoint.stop(_STOP_GRACE_S)
    if http is not None:
        await http.stop()


async def _until_quiet(frontend: Frontend, linger_s: float, give_up_at: float) -> None:
    """Until no request has run for `linger_s`."""
    busy_at = time.monotonic()
    while time.monotonic() < give_up_at and not is_orphaned():
        if frontend.num_in_flight:
            busy_at = time.monotonic()
        elif time.monotonic() >= busy_at + linger_s:
            return
        await asyncio.sleep(_POLL_S)
