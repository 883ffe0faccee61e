"""States that are kept for later prompts: where, how they are used, and what is noticed of one that
is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, NamedTuple

import pytest
import torch

from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.sequence import FinishReason, Sequence
from baton.shared.sampling import SamplingParams
from tests.unit.worker.conftest import BLOCK_SIZE, MakeRunner
from tests.unit.worker.late_runner import LateRunner
from tests.unit.worker.network import Clock
from tests.unit.worker.simulation import Cluster, Request
from tests.unit.worker.test_states import HalfwayBench
from tests.unit.worker.test_steps_ahead import BAD_SEED, sampling

SHARED = tuple(3 + 7 * i % 50 for i in range(22))
PROMPT = (*SHARED, *range(10, 19))
OTHER = (*SHARED, *range(30, 37))
THIRD = (*SHARED, *range(20, 28))
ANSWER = SamplingParams(temperature=0.0, max_tokens=11, ignore_eos=True)
KINDS = ("states", "states alone")


def edge(num_tokens: int) -> int:
    """The last block edge at or before so many tokens."""
    return num_tokens - num_tokens % BLOCK_SIZE


class Kept(NamedTuple):
    position: int
    last_token_ids: tuple[int, ...]
    """Of the block that ends there."""
    slot: int


class OneCluster:
    """Both workers keep states; prompts that are `local` are computed by the one that decodes."""

    _runners: ClassVar[dict[object, ModelRunner]] = {}

    def __init__(
        self, make_runner: MakeRunner, clock: Clock, kind: str, *, late: bool = False, **how: int
    ) -> None:
        how = {"max_num_seqs": 3, "state_checkpoints": 5, **how}
        self.runners: dict[str, ModelRunner] = {
            name: self._made(make_runner, 64, kind, name, how) for name in ("prefill", "decode")
        }
        wrapped = {name: LateRunner(runner) for name, runner in self.runners.items()}
        self.cluster = Cluster(wrapped if late else self.runners, clock)  # type: ignore[arg-type]
        self._loop = PlainLoop(self._made(make_runner, 128, kind, "oracle", {}))
        self.workers = self.cluster.network.workers

    @classmethod
    def _made(
        cls, make: MakeRunner, num_blocks: int, kind: str, name: str, how: dict[str, int]
    ) -> ModelRunner:
        """Each is made once: what the cache holds from before is nobody's."""
        key = (kind, name, *how.values())
        if key not in cls._runners:
            cls._runners[key] = make(num_blocks, kind, **how)
        return cls._runners[key]

    def submit(
        self, prompt: tuple[int, ...], params: SamplingParams = ANSWER, *, is_local: bool = True
    ) -> Request:
        [expected] = self._loop.generate([prompt], [params])
        return self.cluster.submit(prompt, params, expected, is_local=is_local)

    def ask(
        self, prompt: tuple[int, ...], params: SamplingParams = ANSWER, *, is_local: bool = True
    ) -> Request:
        request = self.submit(prompt, params, is_local=is_local)
        self.cluster.settle()
        assert request.token_ids == request.expected
        return request

    def cached(self, name: str = "decode") -> int:
        return self.workers[name].counters["cached_prompt_tokens"]

    def checkpoints(self, name: str = "decode") -> list[Kept]:
        """All that can be found, the shortest prefix first."""
        pools = self.workers[name].pools
        [group] = pools.slot_groups
        blocks = [(slot, pools.of(group).block(slot)) for slot in range(pools.of(group).num_blocks)]
        found = [
            Kept((block.node.index + 1) * BLOCK_SIZE, block.node.token_ids, slot)
            for slot, block in blocks
            if block.node is not None
        ]
        return sorted(found)

    def positions(self, name: str = "decode") -> list[int]:
        return [each.position for each in self.checkpoints(name)]

    def slots(self) -> torch.Tensor:
        return self.runners["decode"].kv_cache.tensors[self.workers["decode"].pools.slot_groups[0]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("engine_loop", "handoff"):
        monkeypatch.setattr(f"baton.services.worker.{module}.time", clock)
    return clock


# Where they are kept


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_turn_begins_where_the_answer_ended(
    kind: str, late: bool, make_runner: MakeRunner, clock: Clock
) -> None:
    """And the same prompt again at its own last block edge; an answer has one state, however long
    it was."""
    one = OneCluster(make_runner, clock, kind, late=late)
    answer = one.ask(PROMPT).token_ids
    end, of_answer = edge(len(PROMPT) - 1), edge(len(PROMPT) + len(answer) - 1)
    assert one.positions() == [end, of_answer]
    assert one.workers["decode"].counters["kept_states"] == 1 + (of_answer - end) // BLOCK_SIZE
    one.ask(PROMPT, replace(ANSWER, temperature=1.0, seed=3))
    assert one.cached() == end
    one.ask((*PROMPT, *answer, 5, 6, 7))
    assert one.cached() == end + of_answer
    assert one.workers["decode"].counters["restored_states"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_where_prompts_branch_is_seen_when_the_second_comes(
    kind: str, make_runner: MakeRunner, clock: Clock
) -> None:
    """The third begins there. Blocks before the branch are there once: the second computes states
    of tokens whose keys and values it finds."""
    one = OneCluster(make_runner, clock, kind)
    one.ask(PROMPT)
    one.ask(OTHER)
    branch = edge(len(SHARED))
    assert one.cached() == 0 and branch in one.positions()
    num_states, num_cached = (
        len(one.positions()),
        one.workers["decode"].pools.prefix_cache.num_cached,
    )
    one.ask(THIRD)
    assert one.cached() == branch
    new_states = len(one.positions()) - num_states
    new_blocks = one.workers["decode"].pools.prefix_cache.num_cached - num_cached - new_states
    whole = edge(len(THIRD) + ANSWER.max_tokens - 1)
    assert new_blocks == (kind == "states") * (whole - branch) // BLOCK_SIZE


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_come_together_branch_at_once(
    kind: str, make_runner: MakeRunner, clock: Clock
) -> None:
    """The second waits until the first has come to where they part."""
    one = OneCluster(make_runner, clock, kind)
    requests = [one.submit(prompt) for prompt in (PROMPT, OTHER, THIRD)]
    one.cluster.settle()
    assert [request.token_ids for request in requests] == [each.expected for each in requests]
    assert one.cached() == 2 * edge(len(SHARED))
    assert [request.num_attempts for request in requests] == [1, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_that_begin_alike(kind: str, make_runner: MakeRunner, clock: Clock) -> None:
    """A slice of a day: three of three turns each, in turns. The first shows nobody anything, the
    second leaves it where their system prompt ends, the third begins there; and every further turn
    begins where its answer before ended."""
    one = OneCluster(make_runner, clock, kind, max_num_seqs=2, state_checkpoints=16)
    short = replace(ANSWER, max_tokens=6)
    talks = [(*SHARED, *range(10 * number + 5, 10 * number + 14)) for number in (1, 2, 3)]
    expected = 0
    for turn in range(3):
        for number, talk in enumerate(talks):
            if turn:
                # The last token of an answer was drawn, not computed.
                expected += edge(len(talk) - 4)
            elif number == 2:
                expected += edge(len(SHARED))
            answer = one.ask(talk, short).token_ids
            assert one.cached() == expected, (turn, number)
            talks[number] = (*talk, *answer, 3 + turn, 4 + number, 5)
    assert one.workers["decode"].counters["restored_states"] == 7


@pytest.mark.parametrize("kind", KINDS)
def test_samples_copy_the_state_of_their_prompt(
    kind: str, make_runner: MakeRunner, clock: Clock
) -> None:
    """They come when the first has a token; the prompt is computed once, but for its last block."""
    one = OneCluster(make_runner, clock, kind)
    first = one.submit(PROMPT, is_local=False)
    one.cluster.settle(until=lambda: bool(first.token_ids))
    drawn = [replace(ANSWER, temperature=1.0, seed=seed) for seed in (1, 2)]
    others = [one.submit(PROMPT, params, is_local=False) for params in drawn]
    one.cluster.settle()
    assert [each.token_ids for each in (first, *others)] == [
        each.expected for each in (first, *others)
    ]
    computed = one.workers["prefill"].counters["computed_prompt_tokens"]
    assert computed == len(PROMPT) + 2 * (len(PROMPT) - edge(len(PROMPT) - 1))


def test_who_reads_a_prompt_keeps_none_of_it(make_runner: MakeRunner, clock: Clock) -> None:
    """But its answer's edge, where it may have to go on by itself."""
    one = OneCluster(make_runner, clock, "states")
    answer = one.ask(PROMPT, is_local=False).token_ids
    assert one.positions("prefill") == [edge(len(PROMPT) - 1)]
    assert one.positions("decode") == [edge(len(PROMPT) + len(answer) - 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_tenants_are_apart(kind: str, make_runner: MakeRunner, clock: Clock) -> None:
    """The same tokens, and no hit: nor is it seen that they branch."""
    one = OneCluster(make_runner, clock, kind)
    one.ask(PROMPT)
    engine = one.workers["decode"].engine
    salted: list[Sequence] = []
    start = engine._start

    def start_salted(sequence: Sequence, recipient: object) -> bool:
        sequence.salt = b"another tenant"
        salted.append(sequence)
        return start(sequence, recipient)  # type: ignore[arg-type]

    engine._start = start_salted  # type: ignore[method-assign]
    one.ask(PROMPT)
    one.ask(OTHER)
    assert one.cached() == 0 and salted[0].stops == (edge(len(PROMPT) - 1),)
    assert salted[1].stops == (edge(len(SHARED)), edge(len(OTHER) - 1)), "its own tenant's"


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded_and_the_least_recently_used_goes(
    kind: str, make_runner: MakeRunner, clock: Clock
) -> None:
    one = OneCluster(make_runner, clock, kind, max_num_seqs=1, state_checkpoints=2)
    prompts = [tuple((11 * i + 5 * j) % 50 + 3 for i in range(13)) for j in range(6)]
    short = replace(ANSWER, max_tokens=2)
    for prompt in prompts:
        one.ask(prompt, short)
        one.ask(prompts[0], short)
        assert len(one.positions()) <= 3
    assert one.cached() >= 6 * edge(12), "what is used is kept"
    before = one.cached()
    one.ask(prompts[1], short)
    assert one.cached() == before


def test_nothing_is_kept_where_it_is_switched_off(make_runner: MakeRunner, clock: Clock) -> None:
    one = OneCluster(make_runner, clock, "states", state_checkpoints=0)
    one.ask(PROMPT)
    one.ask(PROMPT)
    assert one.positions() == [] and one.cached() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_with_one_slot_alone_it_goes_on_without(
    kind: str, make_runner: MakeRunner, clock: Clock
) -> None:
    """A checkpoint that lies in the only free slot is given up, not waited for."""
    one = OneCluster(make_runner, clock, kind)
    for name in ("prefill", "decode"):
        pools = one.workers[name].pools
        for group in pools.slot_groups:
            # All but one are others'.
            taken = pools.of(group).allocate(pools.of(group).num_blocks - 1)
            pools.of(group).quarantine(taken)
            pools.of(group).release(taken)
    one.workers["decode"].pools.check_integrity()
    requests = [one.submit(PROMPT) for _ in range(3)]
    one.cluster.settle(until=lambda: all(request.outcome for request in requests))
    assert [request.outcome for request in requests] == [FinishReason.LENGTH] * 3


# What is wrong with one


def corrupt(slots: torch.Tensor, mine: int, other: int) -> None:
    slots[mine].view(-1)[5] ^= 1


def swap(slots: torch.Tensor, mine: int, other: int) -> None:
    slots[[mine, other]] = slots[[other, mine]]


def make_stale(slots: torch.Tensor, mine: int, other: int) -> None:
    slots[mine] = slots[other]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tamper", [corrupt, swap, make_stale])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_not_what_was_kept_is_noticed_and_computed_anew(
    kind: str,
    tamper: Callable[[torch.Tensor, int, int], None],
    late: bool,
    make_runner: MakeRunner,
    clock: Clock,
) -> None:
    """Swapped with another one, the same prompt's of before, or with a bit turned: a second attempt
    has the right tokens, and nobody finds it any more."""
    one = OneCluster(make_runner, clock, kind, late=late)
    one.ask(OTHER)
    one.ask(PROMPT)
    worker = one.workers["decode"]
    end = edge(len(PROMPT) - 1)
    wanted = end, PROMPT[end - BLOCK_SIZE : end]
    [mine] = [each.slot for each in one.checkpoints() if each[:2] == wanted]
    other = next(each.slot for each in one.checkpoints() if each.slot != mine)
    tamper(one.slots(), mine, other)
    request = one.submit(PROMPT, replace(ANSWER, max_tokens=5))
    one.cluster.settle()
    assert request.token_ids == request.expected and request.num_attempts == 2
    assert worker.counters["digest_mismatches"] >= 1
    again = one.ask(PROMPT, replace(ANSWER, max_tokens=6))
    assert again.num_attempts == 1


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_was_computed_from_a_bad_state_is_dropped(
    kind: str, make_runner: MakeRunner, clock: Clock
) -> None:
    """Checkpoints behind it too; and who runs with a copy begins anew."""
    one = OneCluster(make_runner, clock, kind)
    one.ask(PROMPT)
    one.ask(OTHER)
    one.ask(THIRD)
    [first] = [each.slot for each in one.checkpoints() if each.position == edge(len(SHARED))]
    long = one.submit((*THIRD, 9, 9), replace(ANSWER, max_tokens=20))
    one.cluster.settle(until=lambda: len(long.token_ids) > 2)
    one.slots()[first].view(-1)[3] ^= 4
    fourth = one.ask((*SHARED, 44, 45, 46, 47), ANSWER)
    one.cluster.settle()
    assert fourth.num_attempts == 2
    assert long.token_ids == long.expected
    before = one.cached()
    one.ask((*THIRD, 8))
    assert one.cached() - before <= edge(len(SHARED)), "not the one at the third's end"


# A step that fails, and one too many


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_a_step_that_failed_is_not_kept(kind: str, make_runner: MakeRunner) -> None:
    """One that was restored is copied again by the next attempt, not gone on with."""
    how = {"max_num_seqs": 3, "state_checkpoints": 4}
    loop = PlainLoop(make_runner(64, kind))
    asked = [sampling(1, 9), sampling(BAD_SEED, 9)]
    prompts = [PROMPT, tuple(range(20, 29))]
    [expected] = loop.generate(prompts[:1], asked[:1])
    bench = HalfwayBench(make_runner(64, kind, **how))
    bench.start(0, prompts[0], asked[0])
    bench.run()
    assert bench.tokens[0] == expected
    kept = bench.pools.num_checkpoints
    bench.runner.bad_from = 0
    again = bench.start(2, prompts[0], sampling(1, 9))
    bench.start(1, prompts[1], asked[1])
    bench.run()
    assert again.num_cached_tokens == edge(len(PROMPT) - 1)
    assert set(bench.failures) == {1, 2}
    assert bench.tokens[2] == expected[: len(bench.tokens[2])]
    assert bench.pools.num_checkpoints <= kept
    bench.start(3, prompts[0], sampling(1, 9))
    bench.run()
    assert bench.tokens[3] == expected


@pytest.mark.parametrize("max_tokens", range(6, 11))
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_too_many_leaves_no_state(
    kind: str, max_tokens: int, make_runner: MakeRunner, clock: Clock
) -> None:
    """A step ahead goes beyond the stop token, over a block edge or not: the next turn finds what
    was there before."""
    one = OneCluster(make_runner, clock, kind, late=True)
    [tokens] = one._loop.generate([PROMPT], [ANSWER])
    stop = replace(ANSWER, stop_token_ids=frozenset({tokens[max_tokens - 1]}))
    answer = one.ask(PROMPT, stop).token_ids
    assert one.positions()[-1] == edge(len(PROMPT) + len(answer) - 1)
    one.ask((*PROMPT, *answer, 5))
    assert one.cached() == edge(len(PROMPT) + len(answer) - 1)
