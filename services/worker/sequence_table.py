"""Which sequences are here, who hosts each, and which attempts are refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from baton.shared.kv.sequence import AttemptKey, Sequence, SequenceState

_ATTEMPTS_REMEMBERED = 100_000


@dataclass(frozen=True, slots=True)
class Recipient:
    """Who gets a decode-hosted sequence's tokens: a Decode stream, and its number for it."""

    gateway: str
    number: int


class SequenceTable:
    """Sequences in order of arrival. At most one attempt of each is here at a time.

    A sequence is hosted by a Decode stream, its recipient, or, without one, by a Prefill call.
    """

    def __init__(self) -> None:
        self._sequences: dict[AttemptKey, Sequence] = {}
        self._recipients: dict[Sequence, Recipient] = {}
        self._current: dict[tuple[str, int], AttemptKey] = {}
        self._lowest_attempt: OrderedDict[tuple[str, int], int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._sequences

    def get(self, key: AttemptKey) -> Sequence | None:
        return self._sequences.get(key)

    def all(self) -> list[Sequence]:
        return list(self._sequences.values())

    def in_state(self, state: SequenceState) -> list[Sequence]:
        return [s for s in self._sequences.values() if s.state is state]

    def recipient(self, key: AttemptKey) -> Recipient | None:
        """None: the sequence is hosted by a Prefill call."""
        sequence = self._sequences.get(key)
        return self._recipients.get(sequence) if sequence is not None else None

    def recipient_of(self, sequence: Sequence) -> Recipient:
        """Of a decode-hosted sequence; KeyError for another."""
        return self._recipients[sequence]

    def decode_hosted(self) -> Iterable[Sequence]:
        """In order of arrival; not to be kept."""
        return self._recipients.keys()

    def decode_hosted_in(self, state: SequenceState) -> list[Sequence]:
        return [sequence for sequence in self._recipients if sequence.state is state]

    def of_gateway(self, gateway: str) -> list[Sequence]:
        return [
            sequence
            for sequence, recipient in self._recipients.items()
            if recipient.gateway == gateway
        ]

    def growing(self) -> list[Sequence]:
        """Those that hold blocks and will want more: the decode-hosted ones."""
        return [sequence for sequence in self._recipients if sequence.is_admitted]

    def admitted(self) -> list[Sequence]:
        """Those that have their room here, whoever hosts them."""
        return [sequence for sequence in self._sequences.values() if sequence.is_admitted]

    def add(self, sequence: Sequence, recipient: Recipient | None) -> None:
        """The attempt, and lower ones, will be refused from now on."""
        key = sequence.key
        self._sequences[key] = sequence
        self._current[key.sequence] = key
        if recipient is not None:
            self._recipients[sequence] = recipient
        self.refuse_up_to(key)

    def remove(self, key: AttemptKey) -> Sequence | None:
        if self._current.get(key.sequence) == key:
            del self._current[key.sequence]
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self._recipients.pop(sequence, None)
        return sequence

    def is_stale(self, key: AttemptKey) -> bool:
        return key.attempt < self._lowest_attempt.get(key.sequence, 0)

    def refuse_up_to(self, key: AttemptKey) -> None:
        """Remembered long after the attempt is over: a late start or claim must find nothing."""
        lowest = max(key.attempt + 1, self._lowest_attempt.pop(key.sequence, 0))
        self._lowest_attempt[key.sequence] = lowest
        while len(self._lowest_attempt) > _ATTEMPTS_REMEMBERED:
            self._lowest_attempt.popitem(last=False)

    def attempt_up_to(self, key: AttemptKey) -> Sequence | None:
        """The key's sequence if the attempt of it that is here is the key's or a lower one."""
        current = self._current.get(key.sequence)
        if current is None or current.attempt > key.attempt:
            return None
        return self._sequences[current]
