"""Penalties, biases and bans of an engine over the kernels: its tokens are those of the reference,
which computes one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from baton.shared.engine.batch import Batch, BatchRow, RowHandle
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.drawn import NO_TOKEN, Drawn
from baton.shared.sampling import SamplingParams
from baton.shared.token_masks import TokenMasks
from tests.kernels.test_engine import CONFIG, Make, maker, tokens

pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]

PENALTIES = SamplingParams(
    temperature=0.8,
    presence_penalty=1.5,
    frequency_penalty=0.75,
    repetition_penalty=1.4,
    seed=4,
)
# Each token makes its own repetition likelier: a count that is off shows at once.
LOVES_ITSELF = SamplingParams(temperature=1.0, frequency_penalty=-2.0, seed=6)
BANS = SamplingParams(
    temperature=1.2,
    min_tokens=6,
    logit_bias=((5, 3.0), (7, -100.0), (60, 9.0)),
    allowed_token_ids=frozenset(range(1, 70)),
    stop_token_ids=frozenset(range(30, 40)),
    seed=5,
)
NOTHING = SamplingParams(temperature=0.9, seed=3)
LENGTH = 9


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Runners over a random llama of one layer: what comes before the logits is others' matter."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    return maker(tmp_path_factory.mktemp("small"), {**CONFIG, **small, "head_dim": 16})


@pytest.fixture(scope="module")
def reference(make: Make) -> ModelRunner:
    return make("torch", torch.device("cpu"))


def _fail(*_: Any, **__: Any) -> None:
    raise MemoryError


@dataclass
class Answer:
    """A sequence whose tokens come; a history, too. What earlier attempts emitted ends `given`."""

    given: list[int]
    table: list[list[int]]
    params: SamplingParams
    num_emitted: int = 0
    banned_sequences: tuple[tuple[int, ...], ...] = ()
    drawn: list[int] = field(default_factory=list)
    handle: RowHandle | None = None

    @property
    def num_asked_tokens(self) -> int:
        return len(self.given) - self.num_emitted

    def token_slice(self, start: int, end: int) -> Sequence[int]:
        return [*self.given, *self.drawn][start:end]

    def open(self, runner: ModelRunner) -> Answer:
        self.handle = runner.open_row(self.params, 0, self)
        return self

    def chunk(self, start: int, end: int) -> BatchRow:
        params = self.params if end == len(self.given) else None
        return BatchRow(self.given[start:end], start, self.table, params, 0, self.handle)

    def next(self, drafts: Sequence[int] = (), *, num_ahead: int = 0) -> BatchRow:
        """The step behind what is known, or `num_ahead` further: of a token that nobody knows."""
        position = len(self.given) + len(self.drawn) - 1 + num_ahead
        known = None if num_ahead else self.drawn[-1:]
        return BatchRow(known, position, self.table, self.params, 0, self.handle, drafts)

    def expected(self, runner: ModelRunner) -> list[int]:
        """By the reference, from where it is now."""
        alone = Answer(
            [*self.given], self.table, self.params, self.num_emitted, self.banned_sequences
        )
        alone.open(runner)
        [[first]] = runner.forward(Batch([alone.chunk(0, len(alone.given))]))
        alone.drawn.append(first.token_id)
        while len(alone.drawn) < LENGTH:
            [[token]] = runner.forward(Batch([alone.next()]))
            alone.drawn.append(token.token_id)
        return alone.drawn


def took(answers: Sequence[Answer], results: Sequence[Sequence[Drawn]]) -> None:
    for answer, drawn in zip(answers, results, strict=True):
        assert all(each.failure is None for each in drawn)
        answer.drawn += [each.token_id for each in drawn]


def test_steps_launched_ahead_count_what_nobody_knows_yet(
    make: Make, reference: ModelRunner, device: torch.device
) -> None:
    """Prompts in chunks, one of them of one token; attempts that go on; a slot that changes hands,
    twice."""
    runner = make("triton", device, max_num_seqs=3)
    answers = [
        Answer(tokens(19, 5), [[5, 6, 7]], PENALTIES),
        Answer(tokens(17, 6), [[0, 1]], BANS, num_emitted=3),
        Answer(tokens(5, 7), [[11, 12]], LOVES_ITSELF, num_emitted=2),
    ]
    expected = [each.expected(reference) for each in answers]
    a, b, c = answers
    a.open(runner), b.open(runner), c.open(runner)
    launched = [
        (answers, runner.launch(Batch([a.chunk(0, 16), b.chunk(0, 16), c.chunk(0, 5)]))),
        ((a, b), runner.launch(Batch([a.chunk(16, 19), b.chunk(16, 17)]))),
    ]
    rows = [a.next(num_ahead=1), b.next(num_ahead=1), c.next(num_ahead=1)]
    launched.append(((a, b, c), runner.launch(Batch(rows))))
    for _ in range(2):
        asked, step = launched.pop(0)
        took(asked, step.result())
        # What is launched and not taken yet: two steps of c at first, of all others one.
        ahead = [sum(each in asked for asked, _ in launched) for each in answers]
        rows = [each.next(num_ahead=n) for each, n in zip(answers, ahead, strict=True)]
        launched.append((answers, runner.launch(Batch(rows))))
    for asked, step in launched:
        took(asked, step.result())
    for answer, others in zip(answers, expected, strict=True):
        assert answer.drawn == others[: len(answer.drawn)] and len(answer.drawn) >= 4

    # Whoever had a slot leaves nothing behind in it.
    assert c.handle is not None
    runner.close_row(c.handle)
    d = Answer(tokens(5, 9), [[20]], PENALTIES).open(runner)
    alone = d.expected(reference)
    took((d,), runner.forward(Batch([d.chunk(0, 5)])))
    took((d,), runner.forward(Batch([d.next()])))
    assert d.drawn == alone[:2]


def test_a_token_that_is_stored_already_is_counted(
    make: Make, reference: ModelRunner, device: torch.device
) -> None:
    """Behind it an answer goes on: the row is a chunk, though it has one token, and the device
    counts those of decode rows."""
    runner = make("triton", device)
    params = SamplingParams(temperature=0.0, frequency_penalty=-2.0)
    answer = Answer(tokens(17, 7), [[0, 1]], params, num_emitted=1)
    expected = answer.expected(reference)
    assert expected[0] == answer.given[-1], "it is the likeliest when it is counted"
    answer.open(runner)
    runner.forward(Batch([replace(answer.chunk(0, 17), sampling=None)]))
    took([answer], runner.forward(Batch([replace(answer.chunk(16, 17), num_stored=17)])))
    took([answer], runner.forward(Batch([answer.next()])))
    assert answer.drawn == expected[:2]


def wrong(token_id: int) -> int:
    return (token_id + 1) % int(CONFIG["vocab_size"])


def test_guesses_count_where_they_stand(
    make: Make, reference: ModelRunner, device: torch.device
) -> None:
    """Right ones, wrong ones and none, beside a chunk; a step ahead of which nobody knows what
    stands goes on from it all the same."""
    runner = make("triton", device, num_drafts=3)
    answers = [
        Answer(tokens(19, 5), [[5, 6, 7]], PENALTIES),
        Answer(tokens(7, 6), [[0, 1]], LOVES_ITSELF, num_emitted=2),
        Answer(tokens(21, 7), [[11, 12, 13]], BANS),
    ]
    first, second, third = [each.expected(reference) for each in answers]
    a, b, c = [each.open(runner) for each in answers]
    took((a, b), runner.forward(Batch([a.chunk(0, 19), b.chunk(0, 7)])))
    guesses = [*first[1:3], wrong(first[3])]
    launched = [
        runner.launch(Batch([a.next(guesses), b.next([wrong(second[1])]), c.chunk(0, 16)])),
        runner.launch(Batch([b.next(num_ahead=2), a.next(num_ahead=4)])),
    ]
    took((a, b, c), launched.pop(0).result())
    took((b, a), launched.pop(0).result())
    assert (a.drawn, b.drawn) == (first[:5], second[:3])
    took((a, b, c), runner.forward(Batch([a.next(first[5:7]), b.next(), c.chunk(16, 21)])))
    assert (a.drawn, b.drawn, c.drawn) == (first[:8], second[:4], third[:1])
    took((c, b), runner.forward(Batch([c.next(third[1:4]), b.next(second[4:6])])))
    assert (b.drawn, c.drawn) == (second[:7], third[:5])
    # The slot of who guessed goes to one that does not, in a step in which others do.
    assert b.handle is not None
    runner.close_row(b.handle)
    d = Answer(tokens(5, 8), [[20]], NOTHING)
    fourth = d.expected(reference)
    took((d.open(runner),), runner.forward(Batch([d.chunk(0, 5)])))
    took((c, d), runner.forward(Batch([c.next([third[5]]), d.next()])))
    assert (c.drawn, d.drawn) == (third[:7], fourth[:2])


def test_bad_words_are_banned_behind_guesses_too(
    make: Make, reference: ModelRunner, device: torch.device
) -> None:
    runner = make("triton", device, num_drafts=3)
    params = SamplingParams(temperature=0.0)
    plain = Answer(tokens(7, 5), [[5, 6]], params).expected(reference)
    banned = (tuple(plain[1:3]), (plain[4],), tuple(plain[:4]))
    a = Answer(tokens(7, 5), [[5, 6]], params, banned_sequences=banned)
    expected = a.expected(reference)
    assert expected[:3] != plain[:3]
    took((a.open(runner),), runner.forward(Batch([a.chunk(0, 7)])))
    # The first one completes a bad word; then what is right, and what is not.
    took((a,), runner.forward(Batch([a.next(plain[1:4])])))
    num_known = len(a.drawn)
    assert a.drawn == expected[:num_known]
    right = expected[num_known : num_known + 2]
    took((a,), runner.forward(Batch([a.next([*right, wrong(expected[num_known + 2])])])))
    took((a,), runner.forward(Batch([a.next()])))
    assert a.drawn == expected[: len(a.drawn)] and len(a.drawn) == num_known + 4
    with pytest.raises(ValueError, match="have a say"):
        runner.launch(Batch([replace(a.next(), token_ids=None)]))


def test_all_is_told_again_after_a_launch_that_failed(
    make: Make, reference: ModelRunner, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make("triton", device, prompt_graphs=False)
    a = Answer(tokens(19, 5), [[5, 6, 7]], LOVES_ITSELF)
    b = Answer(tokens(7, 6), [[0, 1]], PENALTIES)
    expected = a.expected(reference)
    took((a.open(runner),), runner.forward(Batch([a.chunk(0, 19)])))
    took((a,), runner.forward(Batch([a.next()])))
    with monkeypatch.context() as patch:
        patch.setattr("baton.shared.engine.launched_steps.chunk_columns", _fail)
        with pytest.raises(MemoryError):
            runner.launch(Batch([a.next(), b.open(runner).chunk(0, 7)]))
    took((a,), runner.forward(Batch([a.next()])))
    assert a.drawn == expected[:3]


def mask_of(answer: Answer) -> TokenMasks:
    """A third of all tokens, by those that were drawn."""
    mask = np.zeros((1, 3), np.uint32)
    for token in Random(repr(answer.drawn)).sample(range(83), 28):
        mask[0, token // 32] |= np.uint32(1 << token % 32)
    return mask


def test_masks_come_while_their_step_computes(
    make: Make, reference: ModelRunner, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the token that the step before drew. One comes too late, and one draw fails: what was
    counted, written and drawn by then is as if it had not been."""
    # Of a captured step no draw can be made to fail.
    runner = make("triton", device, cuda_graphs=False)
    a = Answer(tokens(19, 5), [[5, 6, 7]], LOVES_ITSELF)
    b = Answer(tokens(7, 6), [[0, 1]], PENALTIES)
    free = b.expected(reference)
    alone = replace(a, drawn=[]).open(reference)
    row = alone.chunk(0, 19)
    for _ in range(6):
        row.masks = mask_of(alone)
        took((alone,), reference.forward(Batch([row])))
        row = alone.next()
    a.open(runner), b.open(runner)
    launched = runner.begin(Batch([a.chunk(0, 19), b.chunk(0, 7)])).draw({0: mask_of(a)})
    begun = runner.begin(Batch([b.next(num_ahead=1), a.next(num_ahead=1)]))
    with pytest.raises(RuntimeError, match="not drawn"):
        runner.launch(Batch([b.next(num_ahead=2)]))
    took((a, b), launched.result())
    launched = begun.draw({1: mask_of(a)})
    begun = runner.begin(Batch([a.next(num_ahead=1), b.next(num_ahead=1)]))
    took((b, a), launched.result())
    # Too late.
    launched = begun.draw({})
    assert a.handle is not None
    a.handle.take_back()
    begun = runner.begin(Batch([b.next(num_ahead=1), replace(a.next(), masks=mask_of(a))]))
    took((b,), launched.result()[1:])
    launched = begun.draw({})
    begun = runner.begin(Batch([a.next(num_ahead=1), b.next(num_ahead=1)]))
    took((b, a), launched.result())
    state = runner._executor._context.state  # type: ignore[attr-defined]
    marks = state.shaping.counting.marks[a.handle.slot]
    assert a.handle.shaping is not None
    counted = a.handle.shaping.fresh_marks(83, len(a.given) + len(a.drawn))
    assert marks.tolist() == counted.tolist()
    with monkeypatch.context() as patch:
        patch.setattr("baton.shared.engine.device_draw.draw", _fail)
        with pytest.raises(MemoryError):
            begun.draw({0: mask_of(a)})
    for _ in range(2):
        row = replace(a.next(), masks=mask_of(a))
        took((a, b), runner.forward(Batch([row, b.next()])))
    assert (a.drawn, b.drawn) == (alone.drawn[:5], free[:6])


def test_nothing_left_to_draw_is_said(make: Make, device: torch.device) -> None:
    runner = make("triton", device)
    only_an_end = SamplingParams(allowed_token_ids=frozenset({2}), min_tokens=3)
    a = Answer(tokens(7, 6), [[0, 1]], only_an_end).open(runner)
    b = Answer(tokens(7, 6), [[2, 3]], NOTHING).open(runner)
    [nothing], [token] = runner.forward(Batch([a.chunk(0, 7), b.chunk(0, 7)]))
    assert nothing == NO_TOKEN and token.failure is None


def test_logits_of_16_bits_change_in_32(make: Make, device: torch.device) -> None:
    runner = make("triton", device, dtype="float16")
    params = SamplingParams(temperature=0.0, allowed_token_ids=frozenset({8, 9}))
    # Too little for 16 bits to tell, and enough to go before the other.
    biased = SamplingParams(
        temperature=0.0,
        allowed_token_ids=frozenset({8, 9}),
        logit_bias=((8, 100.0), (9, 100.0 - 2.0**-12)),
        repetition_penalty=2.0**-60,
    )
    a = Answer(tokens(7, 6), [[0, 1]], params).open(runner)
    b = Answer([8, 9], [[2]], biased).open(runner)
    c = Answer(tokens(7, 6), [[3]], SamplingParams(temperature=0.0)).open(runner)
    answers = (a, b, c)
    took(answers, runner.forward(Batch([a.chunk(0, 7), b.chunk(0, 2), c.chunk(0, 7)])))
    took(answers, runner.forward(Batch([each.next() for each in answers])))
    assert {*a.drawn, *b.drawn} <= {8, 9} and set(c.drawn) - {8, 9}
