"""In place of the policy that says how many guesses are checked."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


class EveryGuess:
    """In place of DraftLengths: all are checked, whatever they cost."""

    def __init__(self, most: int) -> None:
        self._most = most

    def wanted(self, num_rows: int, sequences: Sequence[Hashable]) -> list[int]:
        return [self._most] * len(sequences)

    def choose(
        self, num_rows: int, offers: Sequence[tuple[Hashable, int, int]], most: int
    ) -> list[int]:
        return [num_guesses for _, num_guesses, _ in offers]

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
