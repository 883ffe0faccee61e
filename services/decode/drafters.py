"""Drafters: who guesses the next tokens of a sequence, for steps that check several at once.

A guess is never part of the answer: what is drawn counts, and a guess that differs from it ends the
chain. So a drafter may be as wrong as it likes; it costs time, and changes no token.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from baton.shared.kv.sequence import Sequence

Tokens = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]

_LONGEST = 8
"""So many tokens up to a place are compared."""
_SHORTEST = 2
_BEGIN = -1
"""Stands before an answer, and before what was predicted of it."""


class Draft(NamedTuple):
    """A chain of guesses: each is one of the token behind all before it."""

    token_ids: Seq[int] = ()
    """Who looks at them may wait for a device."""
    is_predicted: bool = False
    """They are the client's own (`prediction`)."""


class Drafter(Protocol):
    """Guesses chains."""

    @property
    def needs_known(self) -> bool:
        """Its guesses are worth waiting for the tokens that steps in flight draw."""

    def is_behind(self, sequence: Sequence) -> bool:
        """It has to catch up with the sequence's tokens before it guesses any."""

    def catch_up(self, sequences: Seq[Sequence], *, others_wait: bool) -> bool:
        """Does so for some tokens, of the first sequences first, fewer if `others_wait` for theirs
        meanwhile; whether for any. EngineFailure: as of `drafts`."""

    def drafts(self, wanted: Seq[tuple[Sequence, int]]) -> list[Draft]:
        """For each sequence guesses of the tokens behind those that are known, at most so many.

        EngineFailure: computing failed. Nothing is known of these sequences from then on but what
        `forget` lets go.
        """

    def forget(self, sequence: Sequence) -> None:
        """The sequence takes part in no further step."""


class Predictions:
    """Guesses what the client predicted of the answer, where that goes on as the answer does."""

    def __init__(self) -> None:
        self._predictions: dict[Sequence, _Prediction] = {}

    def draft(self, sequence: Sequence, most: int) -> Draft | None:
        """At most so many guesses; None: it has nothing to say."""
        if not sequence.prediction_token_ids:
            return None
        prediction = self._predictions.get(sequence)
        if prediction is None:
            prediction = self._predictions[sequence] = _Prediction(sequence)
        predicted = prediction.goes_on(sequence, most)
        return Draft(predicted, is_predicted=True) if predicted else None

    def forget(self, sequence: Sequence) -> None:
        self._predictions.pop(sequence, None)


class NgramDrafter:
    """Looks for the last tokens elsewhere, and guesses what came behind them there: in what the
    client predicted of the answer, then in prompt and answer. No model."""

    needs_known = False

    def __init__(self) -> None:
        self._histories: dict[Sequence, _History] = {}
        self._predictions = Predictions()

    def is_behind(self, sequence: Sequence) -> bool:
        return False

    def catch_up(self, sequences: Seq[Sequence], *, others_wait: bool) -> bool:
        return False

    def drafts(self, wanted: Seq[tuple[Sequence, int]]) -> list[Draft]:
        return [self._draft(sequence, most) for sequence, most in wanted]

    def forget(self, sequence: Sequence) -> None:
        self._histories.pop(sequence, None)
        self._predictions.forget(sequence)

    def _draft(self, sequence: Sequence, most: int) -> Draft:
        predicted = self._predictions.draft(sequence, most)
        if predicted is not None:
            return predicted
        history = self._histories.get(sequence)
        if history is None:
            history = self._histories[sequence] = _History(sequence)
        tokens = history.tokens(sequence)
        places = find_places(tokens[:-1], tokens)
        # What came last is the most like what comes now.
        return Draft(behind(tokens, int(places[-1]), most) if len(places) else ())


class _Prediction:
    """What the client expects the answer to be, or parts of it."""

    def __init__(self, sequence: Sequence) -> None:
        # The beginning counts as a token: at first there is little else to find a place by.
        self._tokens = np.array((_BEGIN, *sequence.prediction_token_ids), np.int32)
        self._place = -1

    def goes_on(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        num_emitted = sequence.next_index
        end = sequence.num_tokens
        answer = sequence.token_slice(end - min(num_emitted, _LONGEST), end)
        if num_emitted < _LONGEST:
            answer = (_BEGIN, *answer)
        shortest = min(_SHORTEST, len(answer))
        places = find_places(self._tokens, np.array(answer, np.int32), shortest)
        if not len(places):
            return ()
        # The answer seldom goes back: of equal parts the next one is meant.
        further = places[places > self._place]
        self._place = int(further[0] if len(further) else places[-1])
        return tuple(self._tokens[self._place + 1 : self._place + 1 + most].tolist())


class _History:
    """A sequence's tokens as an array, which grows with them."""

    def __init__(self, sequence: Sequence) -> None:
        num_prompt = sequence.num_prompt_tokens
        self._array = np.empty(num_prompt + sequence.params.max_tokens + 1, np.int32)
        self._array[:num_prompt] = sequence.prompt_token_ids
        self._num_tokens = num_prompt

    def tokens(self, sequence: Sequence) -> Tokens:
        new = sequence.token_slice(self._num_tokens, sequence.num_tokens)
        self._array[self._num_tokens : sequence.num_tokens] = new
        self._num_tokens = sequence.num_tokens
        return self._array[: self._num_tokens]


def find_places(where: Tokens, tokens: Tokens, shortest: int = _SHORTEST) -> Places:
    """Where in `where` the last of `tokens` stands with the most equal tokens before it: itself
    included, at least `shortest` and at most `_LONGEST` are. Rising; empty where it does not."""
    if len(tokens) < shortest:
        return np.empty(0, np.int64)
    places = np.flatnonzero(where == tokens[-1])
    for length in range(1, min(_LONGEST, len(tokens))):
        further = places[places >= length]
        further = further[where[further - length] == tokens[-1 - length]]
        if not len(further):
            return places if length >= shortest else further
        places = further
    return places


def behind(tokens: Tokens, place: int, most: int) -> tuple[int, ...]:
    """What follows `place`; where the tokens end it goes on as it has repeated itself."""
    found = tokens[place + 1 : place + 1 + most].tolist()
    period = len(found)
    while period and len(found) < most:
        found.append(found[-period])
    return tuple(found)
