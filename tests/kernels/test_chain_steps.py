"""Chains of guesses, launched at once: each guess is what the model that guesses would say by
itself, whoever else has a chain, and however long. In the interpreter with a stand-in for graphs;
on a GPU with graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.kernels.reference_logit_shaping import COUNT
from baton.shared.engine.batch import BatchRow, ChainRow
from baton.shared.engine.chain_steps import rows_at, widths_of
from baton.shared.engine.coming_guesses import ComingGuesses, DeviceChains, take_guesses
from baton.shared.engine.draft_model import DraftModel
from baton.shared.engine.executor import ChainShape
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.engine.shaping import KnownTokens
from baton.shared.sampling import SamplingParams
from tests.kernels.stand_in_graphs import StandInGraphs
from tests.kernels.test_engine import SMALL, maker, tokens
from tests.kernels.test_prompt_steps import fields_of

pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]

NUM_GUESSES = 3
LENGTHS = (30, 5, 17)
WAYS = [
    SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True),
    SamplingParams(
        temperature=0.9,
        frequency_penalty=1.0,
        repetition_penalty=1.3,
        max_tokens=9,
        ignore_eos=True,
        seed=5,
    ),
    SamplingParams(temperature=0.8, top_k=20, max_tokens=9, ignore_eos=True, seed=4),
]


class Guessed:
    """A sequence that the model continues by itself; `expected` is what it says."""

    def __init__(
        self, draft: DraftModel, prompt: list[int], params: SamplingParams, block: int
    ) -> None:
        self._draft = draft
        self._prompt = prompt
        self._params = params
        self._block = block
        self.expected: list[int] = []
        self.num_computed = 0

    def chain(self, num_known: int, num_guesses: int, num_answered: int) -> ChainRow:
        """Behind so many tokens of the answer; the last `num_known` tokens are not in the cache."""
        known = [*self._prompt, *self.expected[:num_answered]]
        start = len(known) - num_known
        handle = self._draft.executor.open_row(
            self._params, 0, KnownTokens(known, len(self._prompt))
        )
        num_blocks = -(-(len(known) + num_guesses - 1) // 16)
        table = [*range(self._block, self._block + num_blocks)]
        if start > self.num_computed:
            row = BatchRow(
                known[self.num_computed : start], self.num_computed, [table], None, 0, handle
            )
            self._draft.launch([row]).result()
        row = BatchRow(known[start:], start, [table], self._params, 0, handle)
        self.num_computed = start + num_known + num_guesses - 1
        return ChainRow(row, num_guesses)


def close(draft: DraftModel, chains: Sequence[ChainRow]) -> None:
    for chain in chains:
        assert chain.row.handle is not None
        draft.executor.close_row(chain.row.handle)


@pytest.mark.parametrize("missing", [None, "", "4", "1 2 4"])
def test_each_guess_is_what_the_model_says_by_itself(
    tmp_path: Path, device: torch.device, caplog: pytest.LogCaptureFixture, missing: str | None
) -> None:
    """Rows with fewer and more new tokens, guesses, and penalties, side by side; again behind
    guesses that all stood. As the runner was made, and with stand-ins for graphs, for some of which
    there was no memory."""
    make = maker(tmp_path, SMALL)
    runner = make("triton", device, num_drafts=NUM_GUESSES, draft_model_dir=tmp_path)
    draft = runner.draft
    assert draft is not None
    executor: Any = draft.executor
    if missing is not None:
        caplog.clear()
        with torch.inference_mode(), caplog.at_level("INFO"), executor.computing([]):
            executor._chains.capture(StandInGraphs(len(missing.split())))
        taken, *refused = caplog.records
        assert fields_of(taken)["num_guesses"] == 1 + NUM_GUESSES
        assert fields_of(taken)["sizes"].split() == sorted({"1", "2", "4"} - {*missing.split()})
        assert [fields_of(each)["missing"] for each in refused] == [missing] * bool(missing)
    prompts = [tokens(length, length) for length in LENGTHS]
    expected = PlainLoop(make("torch", torch.device("cpu"))).generate(prompts, WAYS)
    sequences = [
        Guessed(draft, prompt, params, 5 * number)
        for number, (prompt, params) in enumerate(zip(prompts, WAYS, strict=True))
    ]
    for sequence, each in zip(sequences, expected, strict=True):
        sequence.expected = each
    for of_rows in (
        # (tokens of the answer that are known, new tokens, guesses) by row.
        [(0, 1, 3), (0, 4, 1), (0, 2, 2)],
        [(4, 2, 2), (2, 2, 3), (3, 2, 1)],
    ):
        chains = [
            sequence.chain(num_new, num, num_known)
            for sequence, (num_known, num_new, num) in zip(sequences, of_rows, strict=True)
        ]
        guesses = draft.launch_chains(chains).result()
        assert guesses == [
            each[num_known : num_known + num]
            for each, (num_known, _, num) in zip(expected, of_rows, strict=True)
        ]
        close(draft, chains)


def test_what_there_are_no_graphs_for_was_launched_once(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is compiled later, when a chain of that size comes."""
    make = maker(tmp_path, SMALL)
    runner = make("triton", device, num_drafts=NUM_GUESSES, draft_model_dir=tmp_path)
    assert runner.draft is not None
    executor: Any = runner.draft.executor
    steps: set[tuple[str, int, int]] = set()
    for name in ("_first", "_later"):
        monkeypatch.setattr(
            executor._chains,
            name,
            lambda of_size, number, name=name: steps.add((name, of_size.size, number)),
        )
    executor._chains.capture(StandInGraphs(2))
    assert not steps ^ {
        *product(["_first"], [1, 2, 4], [2, 1 + NUM_GUESSES]),
        *product(["_later"], [1, 2, 4], range(1, 1 + NUM_GUESSES)),
    }


def test_places_of_nobody_go_by_no_sequence(tmp_path: Path, device: torch.device) -> None:
    """Three rows are padded to four, in steps for few new tokens, while another sequence had many
    in the first slot."""
    make = maker(tmp_path, SMALL)
    runner = make("triton", device, num_drafts=NUM_GUESSES, draft_model_dir=tmp_path)
    draft = runner.draft
    assert draft is not None
    params = [WAYS[0]] * 4
    prompts = [tokens(6 + number, number) for number in range(4)]
    expected = PlainLoop(make("torch", torch.device("cpu"))).generate(prompts, params)
    first, *others = [
        Guessed(draft, prompt, WAYS[0], 3 * number).chain(4 - 2 * bool(number), 2, 0)
        for number, prompt in enumerate(prompts)
    ]
    assert first.row.handle is not None and first.row.handle.slot == 0
    assert draft.launch_chains([first]).result() == [expected[0][:2]]
    assert draft.launch_chains(others).result() == [each[:2] for each in expected[1:]]
    close(draft, [first, *others])


def test_tokens_are_counted_once(tmp_path: Path, device: torch.device) -> None:
    """Those that a chain begins with by the host, guesses that were computed by the device."""
    make = maker(tmp_path, SMALL)
    runner = make("triton", device, num_drafts=NUM_GUESSES, draft_model_dir=tmp_path)
    draft = runner.draft
    assert draft is not None
    prompt = tokens(5, 1)
    [answer] = PlainLoop(make("torch", torch.device("cpu"))).generate([prompt], [WAYS[1]])
    shaped = Guessed(draft, prompt, WAYS[1], 3)
    shaped.expected = answer
    for num_new in (1, 2, 4):
        shaped.num_computed = 0
        chain = shaped.chain(num_new, NUM_GUESSES, 4)
        assert draft.launch_chains([chain]).result() == [answer[4 : 4 + NUM_GUESSES]]
        executor: Any = draft.executor
        assert chain.row.handle is not None
        marks = executor._context.state.shaping.counting.marks[chain.row.handle.slot] & COUNT
        counted = Counter(
            {token: int(marks[token]) for token in marks.nonzero().flatten().tolist()}
        )
        assert counted == Counter(answer[: 4 + NUM_GUESSES - 1])
        close(draft, [chain])


def test_a_row_that_wants_no_more_writes_no_further(tmp_path: Path, device: torch.device) -> None:
    """Its table ends: what the device has behind it names blocks of others."""
    make = maker(tmp_path, SMALL)
    runner = make("triton", device, num_drafts=NUM_GUESSES, draft_model_dir=tmp_path)
    draft = runner.draft
    assert draft is not None
    short = Guessed(draft, tokens(16, 1), WAYS[0], 3)
    long = Guessed(draft, tokens(5, 2), WAYS[0], 7)
    [memory] = draft.executor.kv_cache.caches
    assert isinstance(memory, torch.Tensor)
    memory.fill_(0.5)
    chains = [short.chain(1, 1, 0), long.chain(1, NUM_GUESSES, 0)]
    [one, all_of_them] = draft.launch_chains(chains).result()
    assert (len(one), len(all_of_them)) == (1, NUM_GUESSES)
    touched = {number for number, block in enumerate(memory) if not bool((block == 0.5).all())}
    assert touched == {3, 7}
    close(draft, chains)


def test_what_is_wrong_with_a_chain_is_told_before_it_begins(
    tmp_path: Path, device: torch.device
) -> None:
    make = maker(tmp_path, SMALL)
    runner = make("triton", device, num_drafts=NUM_GUESSES, draft_model_dir=tmp_path)
    draft = runner.draft
    assert draft is not None
    chain = Guessed(draft, tokens(16, 1), WAYS[0], 3).chain(1, 1, 0)
    with pytest.raises(ValueError, match="shorter than its row"):
        draft.launch_chains([ChainRow(chain.row, 2)])
    with pytest.raises(ValueError, match="a chain of 5 guesses, not 1 to 4"):
        draft.launch_chains([ChainRow(chain.row, NUM_GUESSES + 2)])
    with pytest.raises(ValueError, match="may begin with 4 tokens"):
        row = replace(chain.row, token_ids=tokens(5, 1), position=11)
        draft.launch_chains([ChainRow(row, 1)])
    with pytest.raises(ValueError, match="exceeds 4"):
        draft.launch_chains([chain] * 5)
    with pytest.raises(ValueError, match="max_model_len"):
        row = replace(chain.row, position=draft._max_model_len)
        draft.launch_chains([ChainRow(row, 1)])
    assert draft.launch_chains([chain]).result() != []
    close(draft, [chain])


class Awaited:
    """In place of an event."""

    num_waits = 0

    def synchronize(self) -> None:
        self.num_waits += 1


def chains_of(steps: list[list[int]], num_guesses: list[int], device: str = "cpu") -> DeviceChains:
    tokens = torch.tensor(steps, dtype=torch.int32)
    done: Any = Awaited()
    return DeviceChains(num_guesses, tokens.to(device), tokens, done)


def test_only_who_looks_at_guesses_waits_for_them() -> None:
    chains = chains_of([[5, 7, -1], [-3, 8, 1], [6, 9, 1]], [3, 2, 1])
    done: Any = chains.done
    ended, whole, failed = chains.coming()
    assert [len(ended), len(whole[:1]), len(failed), whole[2:]] == [3, 1, 1, ()]
    assert done.num_waits == 0
    # Token 0 where nothing could be drawn.
    assert [*ended] == [5, 0, 6] and ended[2] == 6 and ended.drawn() == [5]
    assert [*whole] == [7, 8] and [*whole[:1]] == [7] and whole[1:] == (8,)
    assert [*failed] == [0] and failed.drawn() == []
    assert done.num_waits == 1


def test_guesses_are_taken_where_drafts_lie(device: torch.device) -> None:
    chains = chains_of([[5, 7], [-3, 8]], [2, 2], device.type)
    first, second = chains.coming()
    draft_ids = torch.full((4, 3), 77, dtype=torch.int32, device=device)
    take_guesses([(3, first), (1, second)], draft_ids)
    assert draft_ids.tolist() == [[77, 77, 77], [7, 8, 77], [77, 77, 77], [5, 0, 77]]
    # Of chains that are longer.
    few = torch.full((2, 1), 77, dtype=torch.int32, device=device)
    of_second = second[:1]
    assert isinstance(of_second, ComingGuesses)
    take_guesses([(1, of_second)], few)
    assert few.tolist() == [[77], [7]]
    done: Any = chains.done
    assert done.num_waits == 0


def test_the_host_takes_guesses_for_what_the_device_takes_them_for(device: torch.device) -> None:
    """Masks and bans are made of the one, and what stands is found by the other: behind a guess
    that could not be drawn, too."""
    chains = chains_of([[-3], [7], [-1], [8]], [4], device.type)
    [guesses] = chains.coming()
    draft_ids = torch.full((1, 4), 77, dtype=torch.int32, device=device)
    take_guesses([(0, guesses)], draft_ids)
    assert draft_ids.tolist() == [[*guesses]] == [[0, 7, 0, 8]]
    assert guesses.drawn() == []


def test_who_takes_part_in_which_step() -> None:
    slots, num_guesses = [7, 2, 9], [1, 3, 2]
    assert rows_at(0, slots, num_guesses) == [7, 2, 9]
    assert rows_at(1, slots, num_guesses) == [-1, 2, 9]
    assert rows_at(2, slots, num_guesses) == [-1, 2, -1]


def test_tokens_that_a_chain_may_begin_with() -> None:
    """Two, as where all guesses stood, and as many as may have come since the last chain."""
    assert widths_of(ChainShape(num_guesses=4, most_known=5)) == [2, 5]
    assert widths_of(ChainShape(num_guesses=1, most_known=2)) == [2]
