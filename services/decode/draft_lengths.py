"""How many guesses of each sequence a step checks: as many as pay, by what was measured.

Pure but for its memory: how long steps took, by rows and guesses, and how often the guesses of each
sequence stood. A guess that stands with probability p brings p tokens; a step with m guesses takes
longer than one without. Those are taken that make the most tokens per second, likeliest first. None
are where batches are full and guesses cost what they bring, or where nearly all are wrong.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

_SAMPLES = 25
"""The median of so many steps says how long one takes: single ones are held up by others."""
_MARGIN = 1.03
"""Guesses must make the step worth so much more: what it takes is not known better."""
_PROBE_SHARE = 0.005
"""Of the time, that guesses may cost which are not expected to pay: they may have become better."""
_PLAIN_EVERY = 100
"""After so many steps with guesses comes one without, which tells what they cost."""
_PLAIN_EVERY_AT_FIRST = 8
_MEMORY = 0.8
_MEMORY_OF_ALL = 0.99
"""What counts of older guesses when one more is known: of a sequence, and of all together."""
_PRIOR_WEIGHT = 2.0
_FIRST_CHANCE = 0.5
"""That a guess stands, before any was checked."""


@dataclass(slots=True)
class _Chance:
    """That one more guess of a chain stands, when those before it did."""

    memory: float
    stood: float = 0.0
    fell: float = 0.0
    checked_at: int = 0
    """Number of the step that checked some last."""

    def saw(self, num_checked: int, num_stood: int) -> None:
        self.stood = self.stood * self.memory + num_stood
        self.fell = self.fell * self.memory + (num_stood < num_checked)

    def value(self, prior: float) -> float:
        seen = self.stood + self.fell
        return (self.stood + _PRIOR_WEIGHT * prior) / (seen + _PRIOR_WEIGHT)


class _Seconds:
    """How long steps of one kind took lately."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_SAMPLES)
        self.median = 0.0

    def __len__(self) -> int:
        return len(self._seen)

    def saw(self, seconds: float) -> None:
        self._seen.append(seconds)
        self.median = median(self._seen)


class _Costs:
    """How long decode steps take, by their rows and by all guesses in them."""

    def __init__(self) -> None:
        self._by_size: dict[int, dict[int, _Seconds]] = {}
        """By the number of guesses, up to the next power of two; then by load."""

    def saw(self, num_rows: int, num_guesses: int, seconds: float) -> None:
        by_load = self._by_size.setdefault(num_guesses.bit_length(), {})
        by_load.setdefault(_load(num_rows), _Seconds()).saw(seconds)

    def num_plain(self, num_rows: int) -> int:
        """How many steps of so many rows are remembered that had no guesses."""
        return len(self._by_size.get(0, {}).get(_load(num_rows), ()))

    def plain_s(self, num_rows: int) -> float:
        """Of a step without guesses; 0: not known."""
        known = self._by_size.get(0, {}).get(_load(num_rows))
        return known.median if known else 0.0

    def knows(self, num_guesses: int) -> bool:
        """Whether about so many were ever checked."""
        return not num_guesses or num_guesses.bit_length() in self._by_size

    def ratio(self, num_rows: int, num_guesses: int) -> float:
        """By what a step takes longer with so many guesses, at least 1. Where it is not known yet,
        as with about as many rows, or from fewer guesses."""
        load, size, plain = _load(num_rows), num_guesses.bit_length(), self._by_size.get(0, {})
        by_load = self._by_size.get(size, {})
        if load not in by_load or load not in plain:
            known = by_load.keys() & plain.keys()
            if not known:
                # Twice as many guesses, twice the cost; one costs nothing before it was tried.
                fewer = self.ratio(num_rows, num_guesses >> 1) if size > 1 else 1.0
                return 1 + 2 * (fewer - 1)
            load = min(known, key=lambda each: (abs(each - load), each))
        plain_s = plain[load].median
        return max(1.0, by_load[load].median / plain_s) if plain_s > 0 else 1.0


class DraftLengths:
    def __init__(self, most: int) -> None:
        """`most`: guesses of a sequence in a step."""
        self._most = most
        self._costs = _Costs()
        self._all = _Chance(_MEMORY_OF_ALL)
        self._chances: dict[Hashable, _Chance] = {}
        self._num_steps = 0
        self._since_plain = 0
        self._allowance_s = 0.0
        self._num_probes = 0
        self._probe: Hashable = None
        """Whose guesses are checked in the coming step even if nothing is expected of them."""
        self._probe_length = 0

    def wanted(self, num_rows: int, sequences: Sequence[Hashable]) -> list[int]:
        """For each of the sequences of the coming step that may have guesses, how many could pay at
        most. Of those for whom it is 0 nobody needs to guess."""
        self._probe = None
        if self._plain_is_due(num_rows):
            return [0] * len(sequences)
        price = self._lowest_price(num_rows)
        lengths = [0] * len(sequences)
        if price < 1:
            lengths = [self._longest(self._chance(each), price) for each in sequences]
        self._plan_probe(num_rows, sequences, lengths)
        return lengths

    def choose(
        self, num_rows: int, offers: Sequence[tuple[Hashable, int, int]], most: int
    ) -> list[int]:
        """How many of the guesses that are there are checked.

        Args:
            num_rows: sequences of the step.
            offers: a sequence that has guesses, how many, and how many others must have been right
                before the first of them is.
            most: of all together.
        """
        gains: list[tuple[float, int]] = []
        for index, (sequence, num_guesses, ahead) in enumerate(offers):
            chance = self._chance(sequence)
            gains += [(chance ** (ahead + j), index) for j in range(1, num_guesses + 1)]
        # Of a chain the earlier guess is the likelier one, so what is taken is its beginning.
        gains.sort(key=lambda gain: -gain[0])
        del gains[max(most, 0) :]
        best, best_rate, expected = 0, _MARGIN * num_rows, float(num_rows)
        for number, (gain, _) in enumerate(gains, 1):
            expected += gain
            # The cost is that of all numbers up to the next power of two.
            if number == len(gains) or not number & (number + 1):
                rate = expected / self._costs.ratio(num_rows, number)
                if rate > best_rate:
                    best, best_rate = number, rate
                if not self._costs.knows(number):
                    # Step by step: so many may cost far more than fewer did.
                    break
        lengths = [0] * len(offers)
        for _, index in gains[:best]:
            lengths[index] += 1
        for index, (sequence, num_guesses, _) in enumerate(offers):
            if sequence is self._probe and not lengths[index]:
                lengths[index] = min(num_guesses, self._probe_length, max(most - best, 0))
                least_s = (_MARGIN - 1) * self._costs.plain_s(num_rows)
                extra_s = self._extra_s(num_rows, best, best + lengths[index])
                self._allowance_s -= max(extra_s, least_s)
        return lengths

    def checked(self, sequence: Hashable, num_checked: int, num_stood: int) -> None:
        """How many of a sequence's guesses, from the first on, were right."""
        chance = self._chances.setdefault(sequence, _Chance(_MEMORY))
        chance.checked_at = self._num_steps
        for each in (chance, self._all):
            each.saw(num_checked, num_stood)

    def took_step(self, seconds: float, *, num_rows: int, num_guesses: int) -> None:
        """Of a step without chunks of prompts."""
        self._num_steps += 1
        self._since_plain = self._since_plain + 1 if num_guesses else 0
        self._costs.saw(num_rows, num_guesses, seconds)
        most_s = self._extra_s(num_rows, 0, self._most)
        self._allowance_s = min(self._allowance_s + _PROBE_SHARE * seconds, max(most_s, seconds))

    def expects(self, num_rows: int) -> bool:
        """Whether guesses of a sequence of which none were checked may pay beside so many rows."""
        return self._all.value(_FIRST_CHANCE) >= self._lowest_price(max(num_rows, 1))

    def pays(self, num_rows: int, sequences: Iterable[Hashable]) -> bool:
        """Whether guesses of any of them may pay in a step of so many rows: then it waits for those
        in flight. One without guesses does not, or it would seem to take longer than it need."""
        if self._plain_is_due(num_rows):
            return False
        price = self._lowest_price(max(num_rows, 1))
        return any(self._chance(each) >= price for each in sequences)

    def spent(self, seconds: float) -> None:
        """On guesses that are not expected to pay."""
        self._allowance_s -= seconds

    def forget(self, sequence: Hashable) -> None:
        self._chances.pop(sequence, None)

    def _plain_is_due(self, num_rows: int) -> bool:
        every = min(_PLAIN_EVERY, _PLAIN_EVERY_AT_FIRST * self._costs.num_plain(num_rows))
        return self._since_plain >= every

    def _chance(self, sequence: Hashable) -> float:
        prior = self._all.value(_FIRST_CHANCE)
        known = self._chances.get(sequence)
        return prior if known is None else known.value(prior)

    def _lowest_price(self, num_rows: int) -> float:
        """The chance that a guess must have at least, whatever others come along."""
        prices, number = [], 1
        while number <= num_rows * self._most:
            extra = num_rows * (_MARGIN * self._costs.ratio(num_rows, number) - 1)
            prices.append(extra / number)
            number = 2 * number + 1
        return min(prices)

    def _longest(self, chance: float, price: float) -> int:
        length, gain = 0, chance
        while length < self._most and gain >= price:
            length, gain = length + 1, gain * chance
        return length

    def _plan_probe(self, num_rows: int, sequences: Sequence[Hashable], lengths: list[int]) -> None:
        """Lets who was checked longest ago guess anyway, when there is time to spare."""
        # Few and many in turn: what so many cost is measured again as well.
        length = min((2 << self._num_probes % self._most.bit_length()) - 1, self._most)
        if self._extra_s(num_rows, 0, length) > self._allowance_s:
            return
        index = min(range(len(sequences)), key=lambda each: self._checked_at(sequences[each]))
        self._probe, lengths[index] = sequences[index], max(lengths[index], length)
        self._probe_length = length
        self._num_probes += 1

    def _extra_s(self, num_rows: int, num_guesses: int, num_more: int) -> float:
        """What a step takes longer with `num_more` guesses instead of `num_guesses`."""
        more = self._costs.ratio(num_rows, num_more)
        return max(0.0, more - self._costs.ratio(num_rows, num_guesses)) * self._costs.plain_s(
            num_rows
        )

    def _checked_at(self, sequence: Hashable) -> int:
        known = self._chances.get(sequence)
        return 0 if known is None else known.checked_at


def _load(num_rows: int) -> int:
    """Equal for numbers of rows whose steps take about as long: the first four bits count."""
    shift = max(0, num_rows.bit_length() - 4)
    return (num_rows >> shift) << shift
