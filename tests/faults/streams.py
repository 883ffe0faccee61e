"""Answers that are read in the background while the test does something else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

from baton.v1 import inference_service_pb2
from tests.device import PATIENCE
from tests.e2e.harness import Result, Stack, collect

_PATIENCE_S = 60.0 * PATIENCE


class Background:
    """One answer of `stack`, read by a thread of its own from construction on."""

    def __init__(self, stack: Stack, prompt: list[int], **sampling: Any) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.request_id = ""
        self.token_times: list[float] = []
        """When each token arrived, on the monotonic clock."""
        self._stack = stack
        self._result: Result | None = None
        self._error: Exception | None = None
        self._has_started = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self._has_started.wait(_PATIENCE_S), "the answer did not start"

    @property
    def num_tokens(self) -> int:
        return len(self.token_times)

    def result(self) -> Result:
        self._thread.join(_PATIENCE_S)
        assert not self._thread.is_alive(), "the answer did not end"
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _read(self) -> None:
        try:
            self._result = collect(self._watch())
        except Exception as error:
            self._error = error
        self._has_started.set()

    def _watch(self) -> Iterator[inference_service_pb2.GenerateResponse]:
        for response in self._stack.start(self.prompt, **self.sampling):
            if response.HasField("started"):
                self.request_id = response.started.request_id
                self._has_started.set()
            if response.HasField("chunk"):
                self.token_times += [time.monotonic()] * len(response.chunk.token_ids)
            yield response


def events(stack: Stack, worker: str, kind: str, request_id: str) -> list[dict[str, object]]:
    """What `worker` traced of a request, over all attempts."""
    return [
        event
        for event in stack.trace(worker)
        if event["event"] == kind and str(event["key"]).startswith(f"{request_id}/")
    ]
