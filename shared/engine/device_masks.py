"""Masks of tokens on the device, where draws read them: fixed addresses, for graphs keep them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baton.kernels.token_masks import apply_token_masks
from baton.shared.engine.batch import BatchRow
from baton.shared.token_masks import TokenMasks, num_mask_words


class DeviceMasks:
    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        """`max_rows`: of logits."""
        self._device = device
        self._rows = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        """[max_rows], which of the masks each row of logits has; −1: none."""
        shape = (max_rows, num_mask_words(vocab_size))
        self._masks = torch.zeros(shape, dtype=torch.int32, device=device)
        self._is_clear = True

    def send(self, rows: Sequence[BatchRow], wanted: Sequence[int]) -> None:
        """Those of the step that is being launched. `wanted`: which of `rows` each row of logits is
        of, the draws of a row in their order; −1: nobody's. Costs nothing without masks."""
        if self._is_clear and all(row.masks is None for row in rows):
            return
        # Until it is sure what lies on the device.
        self._is_clear = False
        places = np.full(len(self._rows), -1, np.int32)
        masks: list[TokenMasks] = []
        num_draws: Counter[int] = Counter()
        for place, index in enumerate(wanted):
            of_row = rows[index].masks if index >= 0 else None
            if of_row is not None:
                places[place] = len(masks)
                masks.append(of_row[num_draws[index]])
                num_draws[index] += 1
        self._rows.copy_(self._pinned(places), non_blocking=True)
        if masks:
            sent = np.stack(masks).view(np.int32)
            self._masks[: len(masks)].copy_(self._pinned(sent), non_blocking=True)
        self._is_clear = not masks

    def apply(self, logits: Tensor) -> None:
        """To the logits of the step, before anything is drawn."""
        apply_token_masks(logits, self._rows[: len(logits)], self._masks)

    def _pinned(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Tensor:
        """New memory for each copy: it is given back when the copy is over."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._device.type == "cuda" else tensor
