"""The engine loop a step ahead, with everything at once: small pools, common prefixes, stop tokens,
cancels, lost gateways, launches that fail, masks that take long.

Whatever happens to a sequence, each token that it brings is the one that its prompt alone would
have brought.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from baton.services.worker import messages as msg
from baton.services.worker.part import Part
from baton.services.worker.stepper import InFlight, Outcome
from baton.shared.engine.batch import Batch
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.sequence import AttemptKey, FinishReason
from baton.shared.rpc.errors import InvalidField, Preempted
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import MakeRunner
from tests.unit.worker.test_constraining import OnlyOne
from tests.unit.worker.test_steps_ahead import NUM_BLOCKS, Bench, sampling

NUM_EPISODES = 20
POOLS = (6, 9, 14, NUM_BLOCKS)
REFUSED_SHARES = (0.0, 0.0, 0.1, 0.3)
VOCABULARY = range(3, 60)
MAX_LIVE = 8

Prompt = tuple[int, ...]
Launch = Callable[[Batch], Any]


class Alone:
    """What a prompt brings when nothing else runs."""

    def __init__(self, make_runner: MakeRunner) -> None:
        self._loop = PlainLoop(make_runner(NUM_BLOCKS))
        self._known: dict[tuple[Prompt, SamplingParams], list[int]] = {}

    def __call__(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        key = prompt, params
        if key not in self._known:
            [self._known[key]] = self._loop.generate([prompt], [params])
        return self._known[key]


@dataclass
class Asked:
    key: AttemptKey
    expected: list[int]
    reason: FinishReason
    fits: bool
    """Into a pool of its own."""
    is_dropped: bool = False
    """Cancelled, or its gateway went away: it need not end, and says nothing then."""


class Episode:
    """Some steps in which things happen, and then as many as it takes."""

    def __init__(self, number: int, make_runner: MakeRunner, alone: Alone) -> None:
        self.happened: Counter[str] = Counter()
        self._random = random.Random(number)
        self._alone = alone
        self._bench = Bench(make_runner(self._random.choice(POOLS)))
        self._asked: list[Asked] = []
        self._stems = [tuple(self._random.choices(VOCABULARY, k=40)) for _ in range(2)]
        self._refused_share = self._random.choice(REFUSED_SHARES)
        self._is_alone = False
        self._now_s = 0.0

    def run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = self._bench
        for name in ("launch", "begin"):
            monkeypatch.setattr(bench.runner, name, self._refusing(getattr(bench.runner, name)))
        stepper = bench.engine._stepper
        monkeypatch.setattr(stepper._constraining, "_clock", lambda: self._now_s)
        monkeypatch.setattr(stepper, "draw", self._upsetting(stepper.draw))
        monkeypatch.setattr(stepper, "_alone", self._sparing(stepper._alone))
        for _ in range(self._random.randrange(10, 60)):
            self._meddle()
            bench.step()
        bench.run()
        assert not bench.engine._stepper._handles and not bench.engine._admitter._coming
        for slot, asked in enumerate(self._asked):
            self._check(slot, asked)

    def _sparing(self, alone: Callable[[Part], Outcome]) -> Callable[[Part], Outcome]:
        """A row of a step that was refused is not refused again."""

        def tried(part: Part) -> Outcome:
            self._is_alone = True
            try:
                return alone(part)
            finally:
                self._is_alone = False

        return tried

    def _upsetting(self, draw: Callable[[InFlight], None]) -> Callable[[InFlight], None]:
        """Some steps fail to draw."""

        def upset(in_flight: InFlight) -> None:
            begun: Any = in_flight.begun
            if self._random.random() < self._refused_share / 2:
                self.happened["not drawn"] += 1
                begun.fails = True
            draw(in_flight)
            if any(part.is_void for part in in_flight.parts):
                self.happened["void"] += 1

        return upset

    def _take_time(self) -> None:
        """Masks do, now and then all that they may."""
        self._now_s += self._random.choice((0.0, 0.001, 0.03, 0.08))

    def _refusing(self, launch: Launch) -> Launch:
        def refuse_or_launch(batch: Batch) -> Any:
            if not self._is_alone and self._random.random() < self._refused_share:
                self.happened["refused"] += 1
                raise RuntimeError("planted")
            return launch(batch)

        return refuse_or_launch

    def _meddle(self) -> None:
        live = self._live()
        if self._random.random() < 0.35 and len(live) < MAX_LIVE:
            live.append(self._ask())
        if live and self._random.random() < 0.12:
            self._drop([self._random.choice(live)], "cancelled")
        if live and self._random.random() < 0.03:
            self._drop(live, "gateway lost")

    def _live(self) -> list[Asked]:
        bench = self._bench
        return [
            asked
            for slot, asked in enumerate(self._asked)
            if not (asked.is_dropped or slot in bench.reasons or slot in bench.failures)
        ]

    def _ask(self) -> Asked:
        draw = self._random
        stem = draw.choice(self._stems)[: draw.randrange(1, 40)]
        prompt = (*stem, *draw.choices(VOCABULARY, k=draw.randrange(3)))
        params = sampling(draw.randrange(1, 4), draw.randrange(1, 24))
        if draw.random() < 0.3:
            params = replace(params, frequency_penalty=-0.5, repetition_penalty=1.25)
        matcher: Any = None
        if draw.random() < 0.3:
            vocab_size = self._bench.runner.model_config.vocab_size
            matcher = OnlyOne(vocab_size, on_mask=self._take_time)
            expected = matcher.answer(params.max_tokens)
        else:
            expected = self._alone(prompt, params)
        reason = FinishReason.LENGTH
        if draw.random() < 0.4:
            stop = draw.choice(expected)
            params = replace(params, stop_token_ids=frozenset({stop}))
            expected, reason = expected[: expected.index(stop) + 1], FinishReason.STOP
        sequence = self._bench.start(len(self._asked), prompt, params, matcher=matcher)
        fits = self._bench.pools.capacity.holds(sequence.num_to_compute)
        self._asked.append(Asked(sequence.key, expected, reason, fits))
        return self._asked[-1]

    def _drop(self, dropped: list[Asked], how: str) -> None:
        self.happened[how] += 1
        inbox = self._bench.engine.inbox
        if how == "gateway lost":
            inbox.put(msg.GatewayLost("g"))
        for asked in dropped:
            asked.is_dropped = True
            if how == "cancelled":
                inbox.put(msg.CancelAttempts(asked.key))

    def _check(self, slot: int, asked: Asked) -> None:
        bench = self._bench
        tokens, failure = bench.tokens[slot], bench.failures.get(slot)
        assert tokens == asked.expected[: len(tokens)]
        if failure is not None:
            assert isinstance(failure, Preempted if asked.fits else InvalidField)
            self.happened[type(failure).__name__] += 1
        elif slot in bench.reasons:
            assert (tokens, bench.reasons[slot]) == (asked.expected, asked.reason)
            self.happened[asked.reason.name] += 1
        else:
            assert asked.is_dropped


def test_whatever_happens_tokens_are_those_of_the_prompt_alone(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Alone(make_runner)
    happened: Counter[str] = Counter()
    for number in range(NUM_EPISODES):
        episode = Episode(number, make_runner, alone)
        try:
            episode.run(monkeypatch)
        except BaseException as error:
            error.add_note(f"in episode {number}")
            raise
        happened += episode.happened
    kinds = {"refused", "cancelled", "gateway lost", "Preempted", "InvalidField", "LENGTH", "STOP"}
    kinds |= {"void", "not drawn"}
    assert set(happened) == kinds, "an episode in which nothing happens shows nothing"
