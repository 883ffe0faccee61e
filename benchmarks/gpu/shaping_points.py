"""The points of kernel_points.py about what changes logits before a draw, or tells of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from baton.kernels.reference_logit_shaping import BANNED, FINAL
from benchmarks.gpu.gpu_timing import Point, num_sets_for

VOCAB = 128256
_MARKED = 512
"""Tokens that an answer has, or that are banned or may end it."""
_BIASES = 300
_BANS = 16


class Draws:
    """A batch's draws as in the engine: logits in the model's dtype, changed ones in float32."""

    def __init__(self, count: int) -> None:
        from baton.kernels.sampling import make_sampling_scratch
        from baton.shared.engine.batch_state import BatchState

        device = torch.device("cuda")
        self.count = count
        self.num_sets = num_sets_for(2 * count * VOCAB)
        shape = (count, VOCAB)
        self.logits = [
            torch.randn(shape, dtype=torch.bfloat16, device=device) * 3
            for _ in range(self.num_sets)
        ]
        self.state = BatchState(count, 1, [count], device, vocab_size=VOCAB)
        self.rows = torch.arange(count, dtype=torch.int32, device=device)
        self.mask_rows = torch.full_like(self.rows, -1)
        self.masks = torch.randint(
            -(2**31), 2**31 - 1, (count, VOCAB // 32), dtype=torch.int32, device=device
        )
        self.out = torch.zeros_like(self.rows)
        self._changed = torch.zeros(shape, device=device)
        self._work = make_sampling_scratch(count, VOCAB, device)
        self.reset()

    def reset(self) -> None:
        """As rows are that ask for nothing."""
        state, columns = self.state, self.state.shaping
        state.arena.zero_()
        state.temperature.fill_(1.0)
        state.top_p.fill_(1.0)
        columns.repetition.fill_(1.0)
        state.context_lens.fill_(1000)
        state.streams.copy_(torch.randint(2**62, (self.count,)))
        self.mask_rows.fill_(-1)

    def some_tokens(self) -> Tensor:
        """int64 [count, 512], of each row."""
        return torch.randint(VOCAB, (self.count, _MARKED), device="cuda")

    def mark(self, how: int) -> None:
        columns = self.state.shaping
        columns.counting.is_shaped.fill_(1)
        columns.counting.marks.scatter_(1, self.some_tokens(), how)

    def __call__(self, i: int) -> None:
        from baton.kernels.logit_shaping import shape_logits
        from baton.kernels.sampling import draw
        from baton.kernels.token_masks import apply_token_masks

        state, logits = self.state, self.logits[i]
        shape_logits(logits, self.rows, state.context_lens, state.shaping, self._changed)
        apply_token_masks(logits, self.mask_rows, self.masks)
        apply_token_masks(self._changed, self.mask_rows, self.masks)
        draw(
            logits, self.rows, state.context_lens, state.temperature, state.top_k, state.top_p,
            state.min_p, state.streams, state.token_ids, out=self.out, work=self._work,
            changed=self._changed, is_changed=state.shaping.counting.is_shaped,
        )  # fmt: skip


def shaping() -> Iterator[Point]:
    """Whole draws in which all rows ask for something, beside those in which none does."""
    for count in (1, 32, 128):
        yield from _shaping_of(count)
        torch.cuda.empty_cache()


def _shaping_of(count: int) -> Iterator[Point]:
    from baton.shared.engine.logprobs import log_probabilities, packed_logprobs

    draws = Draws(count)
    columns = draws.state.shaping

    def nothing() -> None:
        return

    def penalties() -> None:
        draws.mark(3)
        columns.presence.fill_(0.5)
        columns.frequency.fill_(0.25)
        columns.repetition.fill_(1.1)

    def biases() -> None:
        draws.mark(0)
        columns.num_biases.fill_(_BIASES)
        columns.bias_tokens.copy_(torch.randint(VOCAB, columns.bias_tokens.shape))
        columns.biases.fill_(1.5)

    def bans() -> None:
        draws.mark(BANNED)
        columns.num_bans.fill_(_BANS)
        columns.bans.copy_(torch.randint(VOCAB, columns.bans.shape))

    def min_tokens() -> None:
        draws.mark(FINAL)
        columns.may_end_at.fill_(2000)

    def masks() -> None:
        draws.mask_rows.copy_(draws.rows)

    features: list[tuple[str, Callable[[], None]]] = [
        ("nothing", nothing), ("penalties", penalties), (f"{_BIASES} biases", biases),
        (f"{_MARKED} + {_BANS} bans", bans), ("min tokens", min_tokens), ("masks", masks),
    ]  # fmt: skip
    plain = Draws(count)
    for name, ask in features:
        draws.reset()
        ask()
        yield Point(
            f"{count} {name}",
            draws,
            num_bytes=2 * count * VOCAB,
            num_sets=draws.num_sets,
            library={"plain draw": plain},
        )

    def logprobs(i: int) -> None:
        packed_logprobs(log_probabilities(draws.logits[i]), draws.out)

    yield Point(
        f"{count} logprobs of 20",
        logprobs,
        num_bytes=2 * count * VOCAB,
        num_sets=draws.num_sets,
        library={"plain draw": plain},
        note="beside the draw, and the head again",
    )
