"""What travels between host and device around a step. Nothing here waits for the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.batch_state import scatter
from baton.shared.engine.batch_state import BatchState, aligned

_STEPS_IN_FLIGHT = 4
"""More steps than that are never in flight: a buffer's copy is over when its turn comes again."""


class HostBuffers:
    """Pinned memory on the host, a buffer in turn for each step."""

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        """`max_tokens`: of what a step gives back."""
        self._device = device
        self._is_pinned = device.type == "cuda"
        self._tokens = [
            torch.zeros(max_tokens, dtype=torch.int32, pin_memory=self._is_pinned)
            for _ in range(_STEPS_IN_FLIGHT)
        ]
        self._columns = [self._buffer(0) for _ in range(_STEPS_IN_FLIGHT)]
        self._turn = 0

    def send(self, state: BatchState, columns: npt.NDArray[np.int32] | None) -> Tensor | None:
        """Brings the state up to date, and the step's columns over, with one copy.

        Returns the columns on the device, int32, padded to a multiple of four; None when there was
        nothing to send.
        """
        updates = state.take_updates()
        if updates is None and columns is None:
            return None
        num_updates = 0 if updates is None else updates.shape[1]
        num_columns = 0 if columns is None else aligned(len(columns))
        num_words = num_columns + 2 * num_updates
        buffer, words = self._columns_of(num_words)
        if columns is not None:
            words[: len(columns)] = columns
        if updates is not None:
            words[num_columns:num_words].reshape(2, num_updates)[:] = updates
        sent = buffer[:num_words].to(self._device, non_blocking=True)
        if updates is not None:
            scatter(state.arena, sent[num_columns:].view(2, num_updates))
        return sent[:num_columns]

    def send_to(self, arena: Tensor, state: BatchState, words: npt.NDArray[np.int32]) -> None:
        """The same, but the columns lie at the front of `arena`, int32 on the device, then."""
        if state.num_updates:
            sent = self.send(state, words)
            assert sent is not None
            arena[: len(words)].copy_(sent[: len(words)])
            return
        buffer, own = self._columns_of(len(words))
        own[: len(words)] = words
        arena[: len(words)].copy_(buffer[: len(words)], non_blocking=True)

    def fetch(self, tokens: Tensor) -> Tensor:
        """The last thing of a step: `tokens`, int32 [n], on the host when the stream is there."""
        host = self._tokens[self._turn][: len(tokens)]
        self._turn = (self._turn + 1) % _STEPS_IN_FLIGHT
        host.copy_(tokens, non_blocking=True)
        return host

    def fetch_apart(self, tokens: Tensor) -> Tensor:
        """As `fetch`, of any shape, into memory of its own: however late somebody looks."""
        self._turn = (self._turn + 1) % _STEPS_IN_FLIGHT
        host = torch.empty(tokens.shape, dtype=torch.int32, pin_memory=self._is_pinned)
        return host.copy_(tokens, non_blocking=True)

    def _columns_of(self, num_words: int) -> tuple[Tensor, npt.NDArray[np.int32]]:
        """The step's, with room for so many words."""
        if len(self._columns[self._turn][1]) < num_words:
            self._columns[self._turn] = self._buffer(2 * num_words)
        return self._columns[self._turn]

    def _buffer(self, num_words: int) -> tuple[Tensor, npt.NDArray[np.int32]]:
        """Room for that many words at least, as the device's side sees it and as the host's."""
        buffer = torch.zeros(max(num_words, 4096), dtype=torch.int32, pin_memory=self._is_pinned)
        return buffer, buffer.numpy()
