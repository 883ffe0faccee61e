"""How a request went: told to the metrics as it happens, and to the log in one line at its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from baton.services.gateway.generation import Generation
from baton.services.gateway.metrics import GatewayMetrics
from baton.shared.rpc.errors import BatonError, Draining
from baton.shared.telemetry import NO_TRACE, Trace, log_event
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
        trace: Trace = NO_TRACE,
    ) -> None:
        """Moments are seconds on the monotonic clock. `is_cut_off`: whether the gateway itself is
        what ends requests now."""
        self._trace = trace
        self._request_id = request_id
        self._arrived_at = arrived_at
        self._deadline = deadline
        self._metrics = metrics
        self._is_cut_off = is_cut_off
        self._samples: Sequence[Generation] = ()
        """Empty before it is admitted."""
        self._admitted_at = 0.0
        self._heard_at: dict[int, float] = {}
        """By sample."""
        self._num_finished = 0
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

    def admitted(self, samples: Sequence[Generation]) -> None:
        self._samples = samples
        self._admitted_at = time.monotonic()
        admitted = samples[0].admitted
        log_event(
            logger,
            logging.DEBUG,
            "request admitted",
            request_id=self._request_id,
            num_samples=_if_several(samples),
            num_prompt_tokens=len(admitted.prompt_token_ids),
            num_received=sum(map(len, admitted.received)),
            max_tokens=admitted.params.max_tokens,
        )

    def tokens_came(self, generation: Generation) -> None:
        """Called once for each message with tokens."""
        now, before = generation.last_token_at, self._heard_at.get(generation.sample)
        if before is not None:
            self._metrics.itl.observe(now - before)
        elif not self._heard_at:
            self._metrics.ttft.observe(now - self._arrived_at)
        self._heard_at[generation.sample] = now

    def finished(self) -> None:
        """A sample is whole. Must be called before the client can know of it."""
        self._num_finished += 1
        if self._num_finished == len(self._samples):
            self._answered()

    def _answered(self) -> None:
        """All samples are whole."""
        metrics = self._metrics
        admitted = self._samples[0].admitted
        metrics.prompt_tokens.observe(len(admitted.prompt_token_ids))
        for generation in self._samples:
            assert generation.finish_reason is not None
            metrics.success[generation.finish_reason].inc()
            metrics.generation_tokens.observe(generation.num_new)
            first, last = generation.first_token_at, generation.last_token_at
            if first:
                metrics.e2e.observe(last - self._arrived_at)
                metrics.decode.observe(last - first)
                if generation.num_new > 1:
                    metrics.tpot.observe((last - first) / (generation.num_new - 1))
                if generation.prefill_admitted_at and generation.computes_prompt:
                    metrics.queue.observe(generation.prefill_admitted_at - self._arrived_at)
                    metrics.prefill.observe(max(0.0, first - generation.prefill_admitted_at))
        self._end("OK")

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

    def _end(self, status: str) -> None:
        self._has_ended = True
        self._metrics.requests.labels(status).inc()
        samples, now = self._samples, time.monotonic()
        if not samples:
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
        first_token_at = min(filter(None, (each.first_token_at for each in samples)), default=None)
        self._trace.emit(
            "request",
            request_id=self._request_id,
            status=status,
            arrived=self._arrived_at,
            admitted=self._admitted_at,
            routed=samples[0].routed_at or None,
            first_token=first_token_at,
        )
        log_event(
            logger,
            logging.INFO,
            "request ended",
            request_id=self._request_id,
            num_samples=_if_several(samples),
            attempt=max(each.num_attempts for each in samples),
            status=status,
            finish_reason=_named(
                each.finish_reason.name.lower()
                for each in samples
                if each.finish_reason is not None and status == "OK"
            ),
            num_prompt_tokens=len(samples[0].admitted.prompt_token_ids),
            num_cached_tokens=samples[0].num_cached_tokens,
            num_tokens=sum(each.num_new for each in samples),
            ttft_s=None if first_token_at is None else first_token_at - self._arrived_at,
            e2e_s=now - self._arrived_at,
            prefill=_named(each.prefill_worker_id for each in samples),
            decode=_named(each.decode_worker_id for each in samples),
        )


def _if_several(samples: Sequence[Generation]) -> int | None:
    return len(samples) if len(samples) > 1 else None


def _named(names: Iterable[str]) -> str | None:
    """Each once, in the order of the samples."""
    return ",".join(filter(None, dict.fromkeys(names))) or None


def cause(error: BatonError) -> str:
    """A label's value, such as `worker_lost`."""
    name = error_details_pb2.FailureReason.Name(error.reason)
    return name.removeprefix("FAILURE_REASON_").lower()
