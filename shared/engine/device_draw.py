"""The end of a step on the device: what logits become, and the tokens drawn of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.kernels.drafts import accept_drafts
from baton.kernels.logit_shaping import Guesses, shape_logits
from baton.kernels.sampling import draw, make_sampling_scratch
from baton.kernels.state_plan import DeviceStatePlan
from baton.shared.engine.batch_state import BatchState, aligned
from baton.shared.engine.device_masks import DeviceMasks
from baton.shared.engine.device_plan import GroupPlan


class DeviceDraw:
    """Reads and writes fixed addresses only, but for its arguments: graphs may hold it."""

    def __init__(
        self, state: BatchState, max_rows: int, vocab_size: int, device: torch.device
    ) -> None:
        """`max_rows`: of logits."""
        self._state = state
        self._max_rows = max_rows
        self._vocab_size = vocab_size
        self._device = device
        self.masks = DeviceMasks(max_rows, vocab_size, device)
        self._changed: Tensor | None = None
        self._scratch = make_sampling_scratch(max_rows, vocab_size, device)

    def draw(
        self,
        logits: Tensor,
        rows: Tensor,
        back: Tensor | None,
        out: Tensor,
        num_guess_rows: int = 0,
    ) -> None:
        """Draws a token of each row of logits [R, vocab], which may change.

        Args:
            rows: int32 [R], the slot that each is of; −1: nobody's.
            back: int32 [R], tokens of the slot behind each; None: none.
            out: int32 [R].
            num_guess_rows: of a step with drafts, the rows of logits that decode rows have; they
                come first.
        """
        state = self._state
        changed = self._changed_rows(logits)
        shape_logits(
            logits,
            rows,
            state.context_lens,
            state.shaping,
            logits if changed is None else changed,
            back=back,
            guesses=Guesses(state.draft_ids, state.num_drafts, num_guess_rows)
            if num_guess_rows
            else None,
        )
        self.masks.apply(logits)
        if changed is not None:
            self.masks.apply(changed[: len(logits)])
        draw(
            logits,
            rows,
            state.context_lens,
            state.temperature,
            state.top_k,
            state.top_p,
            state.min_p,
            state.streams,
            state.token_ids,
            out=out,
            work=self._scratch,
            back=back,
            changed=changed,
            is_changed=None if changed is None else state.shaping.counting.is_shaped,
        )

    def _changed_rows(self, logits: Tensor) -> Tensor | None:
        """Where the rows go that change; None: they stay where they are. Penalties are finer than
        16 bits are."""
        if logits.dtype == torch.float32:
            return None
        if self._changed is None:
            # With the first step, so that it is there before memory is measured or captured.
            self._changed = torch.empty(
                self._max_rows, self._vocab_size, dtype=torch.float32, device=self._device
            )
        return self._changed

    def accept(
        self, rows: Tensor, results: Tensor, num_tokens: int, plans: Sequence[GroupPlan]
    ) -> None:
        """results: drawn tokens, those of the decode rows first; behind them goes what stands.
        States go on to that."""
        state, counts = self._state, results[aligned(num_tokens) :]
        accept_drafts(
            rows,
            results,
            state.draft_ids,
            state.num_drafts,
            state.token_ids,
            state.context_lens,
            counts,
            counting=state.shaping.counting,
        )
        for plan in plans:
            if isinstance(plan, DeviceStatePlan):
                plan.settle(counts)
