"""How a request went: told to the metrics as it happens, and to the log in one line at its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import TracebackType

from baton.services.gateway.generation import Generation
from baton.services.gateway.metrics import GatewayMetrics
from baton.shared.kv.sequence import FinishReason
from baton.shared.rpc.errors import BatonError, Draining
from baton.shared.telemetry import log_event
from baton.v1 import error_details_pb2

logger = logging.getLogger("gateway.request")

_DEADLINE_SLACK_S = 0.05
"""A request that is cancelled less than that before its deadline was cancelled because of it."""


class RequestReport:
    """A context for the life of one request. An exception that leaves it means: not answered."""

    def __init__(
        self,
        request_id: str,
        arrived_at: float,
        deadline: float | None,
        metrics: GatewayMetrics,
        *,
        is_cut_off: Callable[[], bool] = lambda: False,
    ) -> None:
        """Moments are seconds on the monotonic clock. `is_cut_off`: whether the gateway itself is
        what ends requests now."""
        self._request_id = request_id
        self._arrived_at = arrived_at
        self._deadline = deadline
        self._metrics = metrics
        self._is_cut_off = is_cut_off
        self._generation: Generation | None = None
        self._heard_at = 0.0
        self._has_ended = False

    def __enter__(self) -> RequestReport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._has_ended:
            self._end(self._status(error))

    def admitted(self, generation: Generation) -> None:
        self._generation = generation
        log_event(
            logger,
            logging.DEBUG,
            "request admitted",
            request_id=self._request_id,
            num_prompt_tokens=len(generation.admitted.prompt_token_ids),
            num_received=len(generation.admitted.received),
            max_tokens=generation.admitted.params.max_tokens,
        )

    def tokens_came(self, now: float) -> None:
        """Called once for each message with tokens; `now` is when they arrived."""
        if self._heard_at:
            self._metrics.itl.observe(now - self._heard_at)
        else:
            self._metrics.ttft.observe(now - self._arrived_at)
        self._heard_at = now

    def finished(self, finish_reason: FinishReason) -> None:
        """The whole answer is there. Must be called before the client can know of it."""
        generation, metrics = self._generation, self._metrics
        assert generation is not None
        metrics.success[finish_reason].inc()
        metrics.prompt_tokens.observe(len(generation.admitted.prompt_token_ids))
        metrics.generation_tokens.observe(generation.num_new)
        first, last = generation.first_token_at, generation.last_token_at
        if first:
            metrics.e2e.observe(last - self._arrived_at)
            metrics.decode.observe(last - first)
            if generation.num_new > 1:
                metrics.tpot.observe((last - first) / (generation.num_new - 1))
            if generation.prefill_admitted_at:
                metrics.queue.observe(generation.prefill_admitted_at - self._arrived_at)
                metrics.prefill.observe(max(0.0, first - generation.prefill_admitted_at))
        self._end("OK", finish_reason)

    def _status(self, error: BaseException | None) -> str:
        if isinstance(error, BatonError):
            return error.code.name
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            if self._is_cut_off():
                return Draining.code.name
            latest = time.monotonic() + _DEADLINE_SLACK_S
            ran_out = self._deadline is not None and latest >= self._deadline
            return "DEADLINE_EXCEEDED" if ran_out else "CANCELLED"
        return "INTERNAL"

    def _end(self, status: str, finish_reason: FinishReason | None = None) -> None:
        self._has_ended = True
        self._metrics.requests.labels(status).inc()
        generation, now = self._generation, time.monotonic()
        if generation is None:
            # Refused: a flood of bad requests must not become a flood of lines.
            log_event(
                logger,
                logging.DEBUG,
                "request refused",
                request_id=self._request_id,
                status=status,
                e2e_s=now - self._arrived_at,
            )
            return
        ttft_s = None
        if generation.first_token_at:
            ttft_s = generation.first_token_at - self._arrived_at
        log_event(
            logger,
            logging.INFO,
            "request ended",
            request_id=self._request_id,
            attempt=generation.num_attempts,
            status=status,
            finish_reason=finish_reason.name.lower() if finish_reason else None,
            num_prompt_tokens=len(generation.admitted.prompt_token_ids),
            num_cached_tokens=generation.num_cached_tokens,
            num_tokens=generation.num_new,
            ttft_s=ttft_s,
            e2e_s=now - self._arrived_at,
            prefill=generation.prefill_worker_id or None,
            decode=generation.decode_worker_id or None,
        )


def cause(error: BatonError) -> str:
    """A label's value, such as `worker_lost`."""
    name = error_details_pb2.FailureReason.Name(error.reason)
    return name.removeprefix("FAILURE_REASON_").lower()
