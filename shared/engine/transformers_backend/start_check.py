"""Measures, at start, that a model of transformers answers over our cache as by itself: its own
attention over whole sequences, against ours over whole ones, over chunks, and beside others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.executor import Executor
from baton.shared.engine.kv_cache import KvCache
from baton.shared.engine.transformers_backend.model import TransformersModel
from baton.shared.kv.cache_spec import CacheGroup
from baton.shared.model_files.fields import ModelError

_LENGTHS = (72, 36, 200)
"""Of sequences; the last one is there to be in the others' company."""
_NUM_COMPARED = 2
Part = tuple[int, int, int]
_STEPS: tuple[tuple[Part, ...], ...] = (
    ((0, 0, 33), (1, 0, 5)),
    ((1, 5, 6), (0, 33, 34)),
    ((0, 34, 50), (1, 6, 36)),
    ((0, 50, 71), (2, 0, 200)),
    ((0, 71, 72),),
)
"""By step, the parts that share it: sequence, first token, end."""
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Of the largest logit."""
_NUM_LAYERS = 16
"""Of more layers narrow types may round further: what each rounds adds up like random steps."""
_WITH_EXPERTS = 2.5
"""In narrow types rounding gives some tokens other experts, in whose logits that is all that shows;
and others attend to these."""
_HOW_TO_TELL = {
    dtype: f"; if it is rounding to {name} after all, dtype float32 serves the model"
    for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16"))
}
"""How much it is, is not known."""


def num_blocks_for(groups: Sequence[CacheGroup], block_size: int) -> int:
    """How many a pool has where all sequences have blocks of their own in every group."""
    return sum(group.num_blocks_for(n, block_size) for group in groups for n in _LENGTHS)


def num_rows() -> int:
    """Of its largest step."""
    return max(map(len, _STEPS))


def most_tokens(of_a_step: int | None) -> int:
    """The longest sequence that is compared where steps are of so many tokens at most."""
    longest = max(_LENGTHS)
    if of_a_step is None:
        return longest
    beside = max(sum(end - begin for which, begin, end in parts if which < 2) for parts in _STEPS)
    return max(1, min(longest, of_a_step - beside))


def check(
    model: TransformersModel,
    executor: Executor,
    vocab_size: int,
    most_tokens: int,
    *,
    has_experts: bool,
) -> bool:
    """Whether the bits of a token's logits are the same whatever shares its step, and however its
    sequence is cut.

    Args:
        executor: over a cache with as many blocks as `num_blocks_for` says, for `num_rows`.
        most_tokens: of the longest sequence.

    Raises:
        ModelError: logits differ from those of the model's own attention.
    """
    draw = random.Random(0)
    known = [token for token in range(vocab_size) if token != model.pad_token_id] or [0]
    sequences = [draw.choices(known, k=min(length, most_tokens)) for length in _LENGTHS]
    compared = sequences[:_NUM_COMPARED]
    cache = executor.kv_cache
    tables = _tables(cache)

    def step(parts: Sequence[Part]) -> list[Tensor]:
        """By part, its logits [tokens, vocab]."""
        rows = [
            BatchRow(
                sequences[which][begin:end],
                begin,
                tables[which],
                num_logits=end - begin if which < _NUM_COMPARED else 1,
            )
            for which, begin, end in parts
        ]
        sizes = [row.num_logits for row in rows]
        return list(torch.split(executor.logits(Batch(rows)), sizes))

    try:
        with model.eager() as run:
            expected = [
                run(torch.tensor(each, device=cache.memory.device)).float() for each in compared
            ]
        whole = [step([(which, 0, len(each))])[0] for which, each in enumerate(compared)]
        # A step that draws nothing, as most of a prompt's chunks.
        executor.launch(Batch([BatchRow(sequences[0][:33], 0, tables[0])])).result()
        parted: list[tuple[Part, Tensor]] = []
        for parts in _STEPS:
            real = [
                (which, begin, min(end, len(sequences[which])))
                for which, begin, end in parts
                if begin < len(sequences[which])
            ]
            if real:
                parted += zip(real, step(real), strict=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model_impl: the model fails over paged attention: {type(error).__name__}: {reason}"
        ) from None
    num_layers = sum(len(group.layer_ids) for group in cache.groups)
    limit = Limit.of(cache.dtype, num_layers, has_experts=has_experts)
    is_stable = True
    for which, logits in enumerate(whole):
        _compare("a whole sequence", logits, expected[which], limit)
        in_parts = torch.cat([each for (index, _, _), each in parted if index == which])
        _compare("a sequence in parts and beside others", in_parts, expected[which], limit)
        is_stable = is_stable and torch.equal(in_parts, logits)
    return is_stable


@dataclass(frozen=True, slots=True)
class Limit:
    """By how much logits may differ and be right."""

    dtype: torch.dtype
    share: float
    """Of the largest logit."""
    of_most_tokens: bool
    """Half of a sequence's tokens must keep it, not all."""

    @classmethod
    def of(cls, dtype: torch.dtype, num_layers: int, *, has_experts: bool) -> Limit:
        share = _TOLERANCE[dtype]
        if dtype == torch.float32:
            return cls(dtype, share, of_most_tokens=False)
        share *= max(1.0, num_layers / _NUM_LAYERS) ** 0.5
        return cls(dtype, share * (_WITH_EXPERTS if has_experts else 1.0), has_experts)

    def difference(self, found: Tensor, expected: Tensor) -> float:
        """Of logits [T, vocab]."""
        by_token = (found - expected).abs().amax(-1)
        # What is not a number is the median where there is one, and the largest.
        return float(by_token.median() if self.of_most_tokens else by_token.max())


def _compare(what: str, found: Tensor, expected: Tensor, limit: Limit) -> None:
    largest = float(expected.abs().max())
    difference = limit.difference(found, expected)
    most = limit.share * largest
    # What is not a number is not at most anything.
    if not difference <= most:
        raise ModelError(
            f"model_impl: {what} gives other logits over paged attention than with the model's own:"
            f" they differ by {difference:.2g}, and {most:.2g} would be rounding"
            + _HOW_TO_TELL.get(limit.dtype, "")
        )


def _tables(cache: KvCache) -> list[list[list[int]]]:
    """By sequence and cache group."""
    first = 0
    tables: list[list[list[int]]] = []
    for length in _LENGTHS:
        tables.append([])
        for group in cache.groups:
            count = group.num_blocks_for(length, cache.block_size)
            tables[-1].append(list(range(first, first + count)))
            first += count
    return tables
