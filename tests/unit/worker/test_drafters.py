"""What is guessed by prompt, answer and prediction; and what the flag says."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from baton.services.decode.drafters import Draft, NgramDrafter
from baton.services.launcher.roles import RoleCounts, StackConfig, UsageError, worker_specs
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.sampling import SamplingParams
from baton.shared.speculation import (
    DEFAULT_DRAFTS,
    MAX_DRAFTS,
    Speculation,
    speculation,
    why_not_together,
)

PARAMS = SamplingParams(max_tokens=64)


def sequence_of(
    prompt: tuple[int, ...], answer: tuple[int, ...], prediction: tuple[int, ...] = ()
) -> Sequence:
    sequence = Sequence(AttemptKey("r", 0, 1), prompt, PARAMS, prediction_token_ids=prediction)
    sequence.output_token_ids = list(answer)
    return sequence


@pytest.mark.parametrize(
    ("prompt", "answer", "guessed"),
    [
        ((1, 2, 3, 4, 5, 6), (9, 2, 3), (4, 5, 6, 9)),
        # Two tokens are the fewest that say something.
        ((1, 2, 3, 4, 5, 6), (9, 3), ()),
        ((1, 2), (3,), ()),
        ((7,), (8,), ()),
        # The longest match; of equals the latest.
        ((5, 2, 3, 4, 6, 2, 3, 8), (5, 2, 3), (4, 6, 2, 3)),
        ((2, 3, 4, 9, 2, 3, 8), (7, 2, 3), (8, 7, 2, 3)),
        # What repeats itself goes on so.
        ((1,), (4, 5, 4, 5), (4, 5, 4, 5)),
        ((1,), (6, 6, 6), (6, 6, 6, 6)),
    ],
)
def test_what_came_behind_the_last_tokens_elsewhere(
    prompt: tuple[int, ...], answer: tuple[int, ...], guessed: tuple[int, ...]
) -> None:
    [draft] = NgramDrafter().drafts([(sequence_of(prompt, answer), 4)])
    assert draft == Draft(guessed)


def test_it_follows_a_sequence_as_it_grows() -> None:
    drafter, sequence = NgramDrafter(), sequence_of((1, 2, 3), (9,))
    assert drafter.drafts([(sequence, 3)]) == [Draft()]
    sequence.output_token_ids += [1, 2]
    assert drafter.drafts([(sequence, 3)]) == [Draft((3, 9, 1))]
    sequence.output_token_ids += [3, 9, 1]
    assert drafter.drafts([(sequence, 3)]) == [Draft((2, 3, 9))]
    drafter.forget(sequence)
    assert not drafter._histories and not drafter._predictions._predictions


@pytest.mark.parametrize(
    ("answer", "guessed"),
    [
        # From the beginning on, one token being enough there.
        ((10,), (11, 12, 13)),
        ((10, 11), (12, 13, 14)),
        # Other words came between; then it is found again.
        ((10, 50, 51, 13, 14), (15, 16)),
        # Of two equal parts that which comes next.
        ((10, 11), (12, 13, 14)),
        # At its end, and where it says nothing, prompt and answer are looked at.
        ((10, 11, 12, 13, 14, 15, 16), ()),
        ((3, 4), (5, 3, 4)),
    ],
)
def test_a_prediction_comes_first(answer: tuple[int, ...], guessed: tuple[int, ...]) -> None:
    prediction = (10, 11, 12, 13, 14, 15, 16)
    [draft] = NgramDrafter().drafts([(sequence_of((3, 4, 5), answer, prediction), 3)])
    assert draft == Draft(guessed, is_predicted=bool(guessed) and guessed[0] != 5)


def test_a_prediction_that_repeats_itself_is_followed_in_its_order() -> None:
    repeated = (20, 21, 1, 20, 21, 2, 20, 21, 3)
    drafter, sequence = NgramDrafter(), sequence_of((9,), (20,), repeated)
    guessed = []
    for token in (21, 1, 20, 21, 2, 20, 21, 3):
        [draft] = drafter.drafts([(sequence, 1)])
        guessed.append(draft.token_ids[0])
        sequence.output_token_ids.append(token)
    assert guessed == [21, 1, 20, 21, 2, 20, 21, 3]


def test_what_an_earlier_attempt_emitted_is_answer_too() -> None:
    sequence = Sequence(
        AttemptKey("r", 0, 2), (9, 8, 10, 11), PARAMS, 2, prediction_token_ids=(10, 11, 12)
    )
    assert NgramDrafter().drafts([(sequence, 3)]) == [Draft((12,), is_predicted=True)]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ngram", Speculation("ngram", DEFAULT_DRAFTS)),
        ("ngram:1", Speculation("ngram", 1)),
        (f"ngram:{MAX_DRAFTS}", Speculation("ngram", MAX_DRAFTS)),
        ("draft-model:3", Speculation("draft-model", 3)),
        ("eagle3:5", Speculation("eagle3", 5)),
        ("none", None),
    ],
)
def test_the_flag(text: str, meant: Speculation | None) -> None:
    assert speculation(text) == meant
    assert meant is None or speculation(str(meant)) == meant


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ngram:0", f"'0' drafts: must be a number from 1 to {MAX_DRAFTS}"),
        ("ngram:16", f"'16' drafts: must be a number from 1 to {MAX_DRAFTS}"),
        ("ngram:", f"'' drafts: must be a number from 1 to {MAX_DRAFTS}"),
        ("ngram:-1", f"'-1' drafts: must be a number from 1 to {MAX_DRAFTS}"),
        ("ngram:²", f"'²' drafts: must be a number from 1 to {MAX_DRAFTS}"),
        ("ngram:" + "9" * 5000, "drafts: must be a number"),
        ("eagle3:16", f"'16' drafts: must be a number from 1 to {MAX_DRAFTS}"),
        ("medusa:4", "'medusa' is no kind of drafts; choose from ngram, draft-model, eagle3"),
        ("", "'' is no kind of drafts; choose from ngram, draft-model, eagle3"),
    ],
)
def test_what_the_flag_refuses(text: str, problem: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=problem):
        speculation(text)


@pytest.mark.parametrize(
    ("speculate", "draft_model", "problem"),
    [
        (Speculation("draft-model", 3), None, "--speculate draft-model:3 needs --draft-model"),
        (Speculation("ngram", 3), Path("m"), "--draft-model is for .*, not for ngram:3"),
        (Speculation("eagle3", 3), None, "--speculate eagle3:3 needs --draft-model"),
        (None, Path("m"), "--draft-model is for --speculate draft-model or eagle3, not for none"),
    ],
)
def test_flags_that_want_each_other(
    speculate: Speculation | None, draft_model: Path | None, problem: str
) -> None:
    assert re.match(problem, why_not_together(speculate, draft_model) or "")
    counts = RoleCounts(prefill=1, decode=1, both=0)
    config = StackConfig(Path("m"), counts, speculate=speculate, draft_model_dir=draft_model)
    with pytest.raises(UsageError, match=problem):
        config.check()


def test_only_workers_that_decode_get_the_draft_model() -> None:
    counts = RoleCounts(prefill=1, decode=1, both=1)
    speculate = Speculation("draft-model", 3)
    config = StackConfig(Path("m"), counts, speculate=speculate, draft_model_dir=Path("d"))
    config.check()
    specs = worker_specs(config, "redis://", Path("/dev/shm"))
    assert ["--draft-model" in spec.argv for spec in specs] == [False, True, True]
