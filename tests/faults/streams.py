"""Answers that are read in the background while the test does something else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from baton.v1 import inference_service_pb2
from tests.device import PATIENCE
from tests.e2e.harness import Result, Stack, collect, collect_samples

_PATIENCE_S = 60.0 * PATIENCE


class Background:
    """One answer of `stack`, or `n` of them, read by a thread of its own from construction on."""

    def __init__(
        self, stack: Stack, prompt: Sequence[int] | str, *, n: int | None = None, **sampling: Any
    ) -> None:
        self.n = n
        self.prompt = prompt
        self.sampling = sampling
        self.request_id = ""
        self.token_times: list[float] = []
        """When each token arrived, on the monotonic clock."""
        self._stack = stack
        self._results: list[Result] = []
        self._error: Exception | None = None
        self._has_started = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self._has_started.wait(_PATIENCE_S), "the answer did not start"

    @property
    def num_tokens(self) -> int:
        return len(self.token_times)

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Result:
        return self.results()[0]

    def results(self) -> list[Result]:
        """Of each sample."""
        self._thread.join(_PATIENCE_S)
        assert not self._thread.is_alive(), "the answer did not end"
        if self._error is not None:
            raise self._error
        return self._results

    def _read(self) -> None:
        try:
            self._results = (
                [collect(self._watch())]
                if self.n is None
                else collect_samples(self._watch(), self.n)
            )
        except Exception as error:
            self._error = error
        self._has_started.set()

    def _watch(self) -> Iterator[inference_service_pb2.GenerateResponse]:
        for response in self._stack.start(self.prompt, n=self.n, **self.sampling):
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
