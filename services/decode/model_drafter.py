"""ModelDrafter: guesses what a smaller model draws, with the noise that the larger one draws by.

    catch_up   what it has not seen of prompt and answer, in chunks: while blocks are handed over,
               and after steps without guesses

Chains are made as chains.py says.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.services.decode import chains
from baton.services.decode.chains import ChainDrafter, Guessing
from baton.shared.engine.batch import BatchRow
from baton.shared.kv.sequence import Sequence
from baton.shared.sampling import SamplingParams


@dataclass(slots=True, eq=False)
class _Reading(Guessing):
    """`num_computed`: of the sequence's tokens, from the first on."""

    @property
    def num_new(self) -> int:
        return self.sequence.num_tokens - self.num_computed

    def settle(self) -> None:
        """What of the guesses was drawn counts as computed. The last token does not count: a chain
        begins with it."""
        self.arrive()
        coming = self.sequence.token_slice(self.num_computed, self.sequence.num_tokens - 1)
        for guess, token_id in zip(self.guesses, coming, strict=False):
            if guess != token_id:
                break
            self.num_computed += 1
        self.guesses = []


class ModelDrafter(ChainDrafter[_Reading]):
    def _make(self, sequence: Sequence, held: Sequence, params: SamplingParams) -> _Reading:
        return _Reading(sequence, held, params)

    def is_behind(self, sequence: Sequence) -> bool:
        known = self._known.get(sequence)
        num_computed = 0 if known is None else known.num_cached
        return sequence.num_tokens - num_computed > chains.FEW

    def _row(self, known: _Reading, num_tokens: int, *, draws: bool) -> BatchRow:
        start = known.num_computed
        return BatchRow(
            known.sequence.token_slice(start, start + num_tokens),
            start,
            known.held.block_tables,
            known.params if draws else None,
            known.sequence.key.sample,
            known.handle,
        )
