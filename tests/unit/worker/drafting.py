"""What drafts in tests: guesses that are right or wrong as planned, and all of them checked."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Seq
from typing import Any

from baton.services.decode.drafters import Draft, Drafter, NgramDrafter
from baton.services.decode.head_drafter import HeadDrafter
from baton.services.decode.model_drafter import ModelDrafter
from baton.services.worker.drafting import Drafting, Lengths
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.sequence import Sequence

Guess = Callable[[Sequence, int], Seq[int]]


class Planned:
    """`guess`: a sequence and a number → guesses of its next tokens, at most so many."""

    needs_known = False

    def __init__(self, guess: Guess) -> None:
        self._guess = guess

    def drafts(self, wanted: Seq[tuple[Sequence, int]]) -> list[Draft]:
        return [Draft(tuple(self._guess(sequence, most))) for sequence, most in wanted]

    def is_behind(self, sequence: Sequence) -> bool:
        return False

    def catch_up(self, sequences: Seq[Sequence], *, others_wait: bool) -> bool:
        return False

    def forget(self, sequence: Sequence) -> None:
        pass


class AllOfThem:
    """Stands in for DraftLengths: every guess is checked, whatever it costs."""

    def __init__(self, most: int) -> None:
        self._most = most

    def wanted(self, num_rows: int, sequences: Seq[Hashable]) -> list[int]:
        return [self._most] * len(sequences)

    def choose(self, num_rows: int, offers: Seq[tuple[Hashable, int, int]], most: int) -> list[int]:
        lengths = []
        for _, num_guesses, _ in offers:
            lengths.append(min(num_guesses, most))
            most -= lengths[-1]
        return lengths

    def checked(self, sequence: Hashable, num_checked: int, num_stood: int) -> None:
        pass

    def took_step(self, seconds: float, *, num_rows: int, num_guesses: int) -> None:
        pass

    def expects(self, num_rows: int) -> bool:
        return True

    def pays(self, num_rows: int, sequences: Iterable[Hashable]) -> bool:
        return True

    def spent(self, seconds: float) -> None:
        pass

    def forget(self, sequence: Hashable) -> None:
        pass


class DraftingRunner:
    """Stands in for a runner whose worker drafts."""

    def __init__(
        self,
        runner: Any,
        drafter: Drafter | None = None,
        num_drafts: int = 3,
        lengths: Lengths | None = None,
    ) -> None:
        """Without `drafter` by n-grams, without `lengths` all of them."""
        self._runner = runner
        self.num_drafts = num_drafts
        lengths = lengths or AllOfThem(num_drafts)
        self.drafting = Drafting(drafter or NgramDrafter(), lengths, num_drafts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class GuessingRunner:
    """Stands in for a runner whose worker lets its draft model, or head, guess, every guess
    checked."""

    def __init__(self, runner: ModelRunner) -> None:
        assert runner.draft is not None
        self._runner = runner
        make: Any = ModelDrafter if runner.draft.tapped is None else HeadDrafter
        self.drafter = make(runner.draft)
        self.drafting = Drafting(self.drafter, AllOfThem(runner.num_drafts), runner.num_drafts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def check(self) -> None:
        """Nobody holds blocks of the draft model's when every answer is over."""
        self.drafter.check_integrity()
        pools = self.drafter._pools
        assert pools.num_free == [pool.num_blocks for pool in pools.by_number]
        assert not self.drafter._known and not self.drafting._missed
