"""Waiting until the gateway would serve a request: grpc.health.v1, without its package. No I/O."""

from __future__ import annotations

import random

import grpc

from baton_client.errors import BatonError, DeadlineExceeded
from baton_client.retry import NO_RETRY, Tries, may_retry
from baton_client.wire_pb2 import HealthCheckRequest, HealthCheckResponse

METHOD = "/grpc.health.v1.Health/Check"
REQUEST = HealthCheckRequest(service="baton.v1.InferenceService")
to_bytes = HealthCheckRequest.SerializeToString
from_bytes = HealthCheckResponse.FromString

_SERVING = 1
_PATIENCE_S = 5.0
"""For one answer; the gateway gives it at once."""
_PAUSE_S = 0.2


class Wait:
    """One wait for readiness: `deadline_s` seconds from now, None for ever."""

    def __init__(self, deadline_s: float | None) -> None:
        self._tries = Tries(NO_RETRY, deadline_s)
        self._seen = "it was not asked"
        self.is_over = False

    def timeout_s(self) -> float:
        """The time for one question. Raises DeadlineExceeded, with what was seen last."""
        try:
            time_left_s = self._tries.time_left_s()
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"not ready in time: {self._seen}", code=error.code) from None
        return _PATIENCE_S if time_left_s is None else min(_PATIENCE_S, time_left_s)

    def answered(self, response: HealthCheckResponse) -> None:
        self.is_over = response.status == _SERVING
        self._seen = "the gateway runs and has no workers, or drains"

    def failed(self, error: BatonError) -> None:
        """Raises `error` if waiting will not mend it."""
        is_slow = error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        if not (is_slow or may_retry(error)):
            raise error
        self._seen = str(error)

    def pause_s(self) -> float:
        """Before the next question."""
        return _PAUSE_S * (1 - random.random() / 2)
