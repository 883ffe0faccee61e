"""The router: which workers a request goes to."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.services.gateway.router import (
    LocalPrefill,
    Role,
    WorkerSnapshot,
    choose,
    depends_on_hits,
    longest_run,
    longest_sequence,
    next_in_turn,
)
from baton.shared.kv.block_hash import PREFIX_STRIDE_TOKENS
from baton.shared.kv.capacity import Capacity, GroupShare


def worker(worker_id: str, role: Role, **changes: Any) -> WorkerSnapshot:
    fields: dict[str, Any] = {
        "worker_id": worker_id,
        "incarnation": f"{worker_id}-first",
        "address": "127.0.0.1:1",
        "role": role,
        "capability_hash": "a",
        "num_blocks": 100,
        "num_free_blocks": 100,
        "num_waiting": 0,
        "num_running": 0,
    }
    fields |= changes
    # Of one cache group, which reads everything, unless a capacity is given.
    length = fields.pop("max_model_len", 1 << 20)
    only_pool = Capacity(16, (fields.pop("num_blocks"),), (GroupShare(0),), length)
    free = fields.pop("num_free_blocks")
    fields.setdefault("capacity", only_pool)
    fields["num_free_blocks"] = free if isinstance(free, tuple) else (free,)
    return WorkerSnapshot(**fields)


def route(
    *workers: WorkerSnapshot,
    hits: dict[str, int] | None = None,
    num_prompt_tokens: int = 160,
    num_tokens: int = 12 * 16,
    **options: Any,
) -> tuple[str | None, str] | None:
    """Ids of the chosen (prefill, decode)."""
    chosen = choose(workers, hits or {}, num_prompt_tokens, num_tokens, **options)
    if chosen is None:
        return None
    prefill_id = chosen.prefill.worker_id if chosen.prefill else None
    return prefill_id, chosen.decode.worker_id


@given(st.data())
def test_nobody_is_asked_for_hits_that_make_no_difference(data: st.DataObject) -> None:
    """Whatever is cached where, then, the workers are the same."""
    workers = [
        worker(
            f"w{number}",
            data.draw(st.sampled_from(["prefill", "decode", "both"])),
            suspect=data.draw(st.booleans()),
            capability_hash=data.draw(st.sampled_from("ab")),
            num_blocks=data.draw(st.sampled_from([8, 100])),
        )
        for number in range(data.draw(st.integers(1, 4)))
    ]
    local = data.draw(st.sampled_from([None, LocalPrefill(100, late_after_s=1.0)]))
    wanted: dict[str, Any] = {"capability_hash": data.draw(st.sampled_from([None, "a"]))}
    wanted["local_prefill"] = local
    hits = {each.worker_id: data.draw(st.sampled_from([0, 64, 128])) for each in workers}
    if not depends_on_hits(workers, 160, 12 * 16, **wanted):
        assert route(*workers, hits=hits, **wanted) == route(*workers, **wanted)


def test_hits_count_where_there_is_a_choice() -> None:
    prefill, decode, both = worker("p", "prefill"), worker("d", "decode"), worker("b", "both")
    for alone in ([prefill, decode], [prefill, decode, both], [both], [both, decode], [decode]):
        assert not depends_on_hits(alone, 160, 192)
    for several in ([prefill, worker("q", "prefill"), decode], [both, worker("c", "both")]):
        assert depends_on_hits(several, 160, 192)
    # Where a partner may take the prompt.
    assert depends_on_hits([prefill, both], 160, 192, local_prefill=LocalPrefill(100))


def test_roles() -> None:
    prefill, decode, both = worker("p", "prefill"), worker("d", "decode"), worker("b", "both")
    assert route(prefill, decode) == ("p", "d")
    assert route(prefill, both) == ("p", "b")
    assert route(both) == (None, "b")
    assert route(both, decode) == (None, "b")
    # A decode worker does not compute a prompt by itself: the request waits.
    assert route(decode) is None
    assert route(prefill) is None
    assert route() is None


def test_with_prefill_workers_both_may_decode_but_does_not_compute_the_prompt() -> None:
    busy = worker("p", "prefill", num_waiting=9)
    both = worker("b", "both")
    full = worker("d", "decode", num_free_blocks=1)
    assert route(busy, both, full, hits={"b": 100}) == ("p", "b")


def test_the_longest_cached_run_comes_before_the_shortest_queue() -> None:
    long = worker("long", "prefill", num_waiting=5)
    short = worker("short", "prefill")
    decode = worker("d", "decode")
    assert route(long, short, decode, hits={"long": 112, "short": 96}) == ("long", "d")
    assert route(long, short, decode, hits={"long": 96, "short": 96}) == ("short", "d")
    assert route(long, short, decode) == ("short", "d")


def test_the_queue_counts_those_waiting_and_those_running() -> None:
    waiting = worker("w", "prefill", num_waiting=2, num_running=1)
    running = worker("r", "prefill", num_running=2)
    assert route(waiting, running, worker("d", "decode")) == ("r", "d")


def test_a_run_longer_than_the_prompt_is_worth_no_more() -> None:
    """The last token is always computed, so 159 and 160 cached tokens of 160 are the same."""
    queued = worker("p1", "prefill", num_waiting=1)
    idle = worker("p2", "prefill")
    hits = {"p1": 512, "p2": 159}
    assert route(queued, idle, worker("d", "decode"), hits=hits) == ("p2", "d")


def test_a_cached_run_is_worth_the_queue_that_it_spares() -> None:
    """The gateway knows what it sent before the worker says so: replicas take bursts in turn."""
    holder = worker("b1", "both", num_outstanding_tokens=96)
    idle = worker("b2", "both")
    assert route(holder, idle, hits={"b1": 128}) == (None, "b1")
    assert route(holder, idle, hits={"b1": 64}) == (None, "b2")
    assert route(holder, worker("b2", "both", num_running=9)) == (None, "b2")


def test_decode_goes_to_most_free_blocks_then_to_the_smallest_batch() -> None:
    prefill = worker("p", "prefill")
    roomy = worker("d1", "decode", num_free_blocks=60, num_running=9)
    full = worker("d2", "decode", num_free_blocks=59)
    assert route(prefill, roomy, full) == ("p", "d1")
    small = worker("d3", "decode", num_free_blocks=60, num_running=8)
    assert route(prefill, roomy, full, small) == ("p", "d3")


def test_only_equal_capabilities_make_a_pair() -> None:
    prefill = worker("p", "prefill", capability_hash="a", num_waiting=9)
    decode = worker("d", "decode", capability_hash="a", num_free_blocks=1)
    other_prefill = worker("p2", "prefill", capability_hash="b")
    other_decode = worker("d2", "decode", capability_hash="c")
    assert route(prefill, decode, other_prefill, other_decode) == ("p", "d")
    assert route(prefill, other_decode) is None
    # Nor does a pair of another capability keep a lone `both` from working.
    alone = worker("b", "both", capability_hash="b")
    assert route(prefill, decode, alone) == (None, "b")
    assert route(prefill, other_decode, alone) == (None, "b")


def test_a_later_attempt_keeps_its_capability() -> None:
    workers = [worker("b1", "both", capability_hash="a", num_waiting=9)]
    workers.append(worker("b2", "both", capability_hash="b"))
    assert route(*workers) == (None, "b2")
    assert route(*workers, capability_hash="a") == (None, "b1")
    assert route(*workers, capability_hash="c") is None


def test_suspect_workers_get_nothing() -> None:
    prefill, decode = worker("p", "prefill"), worker("d", "decode")
    doubted = worker("p", "prefill", suspect=True)
    assert route(doubted, decode) is None
    assert route(prefill, worker("d", "decode", suspect=True)) is None
    # When the only prefill worker is gone, `both` takes its part.
    assert route(doubted, decode, worker("b", "both")) == (None, "b")


def test_pools_that_cannot_hold_the_request_are_left_out() -> None:
    prefill, decode = worker("p", "prefill"), worker("d", "decode")
    small = worker("s", "decode", num_blocks=11, num_free_blocks=200)
    assert route(prefill, decode, small) == ("p", "d")
    assert route(prefill, small) is None
    assert route(worker("b", "both", num_blocks=11)) is None
    # The prefill worker holds the prompt only: 160 tokens are 10 blocks.
    assert route(worker("p", "prefill", num_blocks=10), decode) == ("p", "d")
    assert route(worker("p", "prefill", num_blocks=9), decode) is None
    assert route(worker("p", "prefill", num_blocks=10), decode, num_prompt_tokens=161) is None


def test_a_full_pool_is_still_a_candidate() -> None:
    """A new request waits for room; it is not refused."""
    full = worker("d", "decode", num_free_blocks=0)
    assert route(worker("p", "prefill", num_free_blocks=0), full) == ("p", "d")


def test_equal_workers_take_turns() -> None:
    workers = [worker(f"p{n}", "prefill") for n in range(3)]
    workers += [worker(f"d{n}", "decode") for n in range(2)]
    chosen = [route(*workers, spread=spread) for spread in range(12)]
    pairs = [pair for pair in chosen if pair is not None]
    assert Counter(pair[0] for pair in pairs) == {"p0": 4, "p1": 4, "p2": 4}
    assert Counter(pair[1] for pair in pairs) == {"d0": 6, "d1": 6}


def test_the_order_of_the_workers_does_not_matter() -> None:
    workers = [worker(f"p{n}", "prefill") for n in range(4)]
    workers += [worker(f"d{n}", "decode") for n in range(4)]
    shuffled = random.Random(1).sample(workers, len(workers))
    assert route(*workers, spread=2) == route(*shuffled, spread=2) == ("p2", "d2")


WORKERS = st.lists(
    st.builds(
        worker,
        worker_id=st.sampled_from([f"w{n}" for n in range(8)]),
        role=st.sampled_from(["prefill", "decode", "both"]),
        capability_hash=st.sampled_from("ab"),
        num_blocks=st.integers(8, 14),
        num_free_blocks=st.integers(0, 3),
        num_waiting=st.integers(0, 2),
        num_running=st.integers(0, 2),
        num_outstanding_tokens=st.sampled_from([0, 40, 160, 1000]),
        suspect=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.worker_id,
)


@given(workers=WORKERS, spread=st.integers(0, 9))
def test_a_route_keeps_every_rule_and_is_found_when_there_is_one(
    workers: list[WorkerSnapshot], spread: int
) -> None:
    def fits(each: WorkerSnapshot) -> bool:
        return not each.suspect and each.capacity.num_blocks[0] >= (
            10 if each.role == "prefill" else 12
        )

    pairs = [
        (first, second)
        for first in workers
        for second in workers
        if first.role == "prefill"
        and second.role != "prefill"
        and first.capability_hash == second.capability_hash
        and fits(first)
        and fits(second)
    ]
    served = {second.capability_hash for _, second in pairs}
    alone = [
        (None, each)
        for each in workers
        if each.role == "both" and fits(each) and each.capability_hash not in served
    ]
    chosen = choose(workers, {}, 160, 192, spread=spread)
    assert (chosen is None) == (not pairs and not alone)
    if chosen is not None:
        assert (chosen.prefill, chosen.decode) in [*pairs, *alone]
        assert chosen.num_new_tokens == 160
    # Whatever the rule for long queues says, somebody takes what somebody could take before, and
    # a prompt that goes around the prefill workers goes to a partner of one.
    relieved = choose(workers, {}, 160, 192, spread=spread, local_prefill=LocalPrefill(200, 0.5))
    assert (relieved is None) == (chosen is None)
    if relieved is not None and relieved.prefill is None and pairs:
        assert relieved.decode.role == "both"
        assert relieved.decode.capability_hash in served | {w.capability_hash for _, w in alone}
    # Held is only what a busy prefill worker could compute later.
    held = choose(workers, {}, 160, 192, spread=spread, local_prefill=LocalPrefill(200, 0.5, 1.0))
    if held is None and chosen is not None:
        assert all(first.num_outstanding_tokens for first, _ in pairs)


RULE = LocalPrefill(threshold_tokens=1000, max_share=0.25)


def test_a_long_queue_spills_over_to_a_partner_that_can_compute() -> None:
    """160 tokens: up to 840 before them, the prefill worker is fast enough."""
    both = worker("b", "both")
    at_threshold = worker("p", "prefill", num_outstanding_tokens=840)
    beyond = worker("p", "prefill", num_outstanding_tokens=841)
    assert route(at_threshold, both, local_prefill=RULE) == ("p", "b")
    assert route(beyond, both, local_prefill=RULE) == (None, "b")
    assert route(beyond, both) == ("p", "b")
    # Who only decodes cannot help; nor does its room keep the one that can from helping.
    decode = worker("d", "decode")
    assert route(beyond, decode, local_prefill=RULE) == ("p", "d")
    full = worker("b", "both", num_free_blocks=0)
    assert route(beyond, decode, full, local_prefill=RULE) == (None, "b")


def test_a_partner_takes_no_more_than_its_share_of_the_queue() -> None:
    prefill = worker("p", "prefill", num_outstanding_tokens=1840)
    at_share = worker("b", "both", num_outstanding_tokens=340)
    beyond = worker("b", "both", num_outstanding_tokens=341)
    assert route(prefill, at_share, local_prefill=RULE) == (None, "b")
    assert route(prefill, beyond, local_prefill=RULE) == ("p", "b")
    # So a long prompt needs a longer queue than the threshold.
    first = worker("p", "prefill", num_outstanding_tokens=700)
    options: dict[str, Any] = {"num_tokens": 60 * 16, "local_prefill": RULE}
    assert route(first, worker("b", "both"), num_prompt_tokens=800, **options) == ("p", "b")


def test_of_several_partners_the_one_with_the_shortest_queue_takes_it() -> None:
    prefill = worker("p", "prefill", num_outstanding_tokens=2000)
    busy = worker("b1", "both", num_outstanding_tokens=100, num_free_blocks=90)
    idle = worker("b2", "both", num_free_blocks=50)
    assert route(prefill, busy, idle, local_prefill=RULE) == (None, "b2")
    # The others decode as before, by their room.
    assert route(worker("p", "prefill"), busy, idle, local_prefill=RULE) == ("p", "b1")
    # One of another capability works alone, and is no partner.
    stranger = worker("b3", "both", capability_hash="b", num_outstanding_tokens=9000)
    assert route(prefill, busy, stranger, local_prefill=RULE) == (None, "b1")


def test_only_tokens_that_have_to_be_computed_count() -> None:
    prefill, both = worker("p", "prefill", num_outstanding_tokens=900), worker("b", "both")
    assert route(prefill, both, local_prefill=RULE) == (None, "b")
    assert route(prefill, both, hits={"p": 96}, local_prefill=RULE) == ("p", "b")
    tight = worker("b", "both", num_outstanding_tokens=200)
    assert route(prefill, tight, local_prefill=RULE) == ("p", "b")
    assert route(prefill, tight, hits={"b": 112}, local_prefill=RULE) == (None, "b")


# A token is 1 KiB, and a sequence has 4 MiB of states, as far as it keeps any.
PLAIN = Capacity(16, (10_000,), (GroupShare(0),), 1 << 20, (16 << 10,))
STATES = Capacity(16, (10_000, 99), (GroupShare(0), GroupShare(1, 1)), 1 << 20, (16 << 10, 4 << 20))


@pytest.mark.parametrize(
    ("capacity", "num_tokens", "hits", "is_nearer"),
    [
        # A GiB/s is 1024 tokens in a millisecond, and a state in four; 50 are computed in one.
        (PLAIN, 16, {}, False),
        (PLAIN, 4096, {}, False),
        (STATES, 64, {}, True),
        (STATES, 192, {}, True),
        (STATES, 240, {}, False),
        (STATES, 4096, {}, False),
        # It computes less of it, and reads fewer blocks, but the whole state.
        (STATES, 4096, {"b": 4000}, True),
        (PLAIN, 4096, {"b": 4000}, False),
    ],
)
def test_what_moves_more_slowly_than_it_is_computed_stays(
    capacity: Capacity, num_tokens: int, hits: dict[str, int], is_nearer: bool
) -> None:
    free = capacity.num_blocks
    p = worker("p", "prefill", capacity=capacity, num_free_blocks=free)
    known = {"prompt_tokens_per_s": 50_000, "path_bytes_per_s": {"p": 1 << 30}}
    b = worker("b", "both", capacity=capacity, num_free_blocks=free, **known)

    def asked(*workers: WorkerSnapshot, **options: Any) -> tuple[str | None, str] | None:
        return route(
            *workers, hits=hits, num_prompt_tokens=num_tokens, num_tokens=num_tokens + 9, **options
        )

    rule = LocalPrefill(threshold_tokens=1 << 20)
    assert asked(p, b, local_prefill=rule) == (None if is_nearer else "p", "b")
    assert asked(p, b) == ("p", "b"), "where that is not asked for"
    for unknown in ({"prompt_tokens_per_s": 0}, {"path_bytes_per_s": {"other": 9}}):
        assert asked(p, replace(b, **unknown), local_prefill=rule) == ("p", "b")
    busy = replace(b, num_outstanding_tokens=9999)
    assert asked(p, busy, local_prefill=rule) == ("p", "b"), "its own queue is longer"
    decode = replace(b, role="decode")
    assert asked(p, decode, local_prefill=rule) == ("p", "b"), "it computes no prompts"


HOLDING = LocalPrefill(threshold_tokens=1000, max_share=0.5, late_after_s=0.5)


def test_a_prompt_that_neither_side_may_take_now_has_no_route() -> None:
    full = worker("p", "prefill", num_outstanding_tokens=841)
    both = worker("b", "both", num_outstanding_tokens=400)
    assert route(full, both, local_prefill=HOLDING) is None
    assert route(full, worker("d", "decode"), local_prefill=HOLDING) is None
    # Either side's room is enough, and another prefill worker's before the partner's.
    assert route(full, worker("b", "both"), local_prefill=HOLDING) == (None, "b")
    roomy = worker("p", "prefill", num_outstanding_tokens=840)
    assert route(roomy, both, local_prefill=HOLDING) == ("p", "b")
    second = worker("p2", "prefill", num_outstanding_tokens=600, num_waiting=9)
    assert route(full, second, worker("b", "both"), local_prefill=HOLDING) == ("p2", "b")


def test_a_prompt_longer_than_the_threshold_goes_to_an_idle_worker() -> None:
    options: dict[str, Any] = {"num_tokens": 90 * 16, "local_prefill": HOLDING}
    both = worker("b", "both", num_outstanding_tokens=1)
    assert route(worker("p", "prefill"), both, num_prompt_tokens=1400, **options) == ("p", "b")
    busy = worker("p", "prefill", num_outstanding_tokens=1)
    assert route(busy, both, num_prompt_tokens=1400, **options) is None


def test_replicas_hold_nothing() -> None:
    assert route(worker("b", "both", num_outstanding_tokens=9000), local_prefill=HOLDING)


def test_while_the_prefill_worker_is_doubted_its_partner_takes_what_it_has_room_for() -> None:
    doubted = worker("p", "prefill", suspect=True)
    roomy = worker("b", "both", num_outstanding_tokens=840)
    full = worker("b", "both", num_outstanding_tokens=841)
    assert route(doubted, roomy, local_prefill=HOLDING) == (None, "b")
    assert route(doubted, full, local_prefill=HOLDING) is None
    assert route(doubted, full, local_prefill=RULE) == (None, "b")
    stranger = worker("p", "prefill", suspect=True, capability_hash="other")
    assert route(stranger, full, local_prefill=HOLDING) == (None, "b")


def test_the_oldest_is_next_and_the_late_come_last() -> None:
    since_s = {"late": 0.0, "later": 1.0, "first": 9.5, "second": 9.6}

    def next_at(now_s: float) -> str | None:
        return next_in_turn(list(since_s), since_s.__getitem__, now_s, 0.5)

    assert next_in_turn([], since_s.__getitem__, 9.0, 0.5) is None
    assert [next_at(now_s) for now_s in (10.0, 10.05, 11.0)] == ["first", "second", "late"]


@pytest.mark.parametrize(
    "values", [(-1, 0.5), (1, -0.1), (1, 1.1), (1, 0.5, -1.0), (1, 0.5, float("nan"))]
)
def test_rules_that_make_no_sense_are_refused(values: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="--l"):
        LocalPrefill(*values)


def test_a_route_tells_what_is_left_to_compute() -> None:
    workers = [worker("p", "prefill"), worker("b", "both")]
    pair = choose(workers, {"p": 96, "b": 112}, 160, 192)
    assert pair is not None and pair.computes_prompt.worker_id == "p"
    assert pair.num_new_tokens == 64
    alone = choose(workers[1:], {"p": 96, "b": 512}, 160, 192)
    assert alone is not None and alone.computes_prompt.worker_id == "b"
    assert alone.num_new_tokens == 1


def test_longest_run_reaches_to_the_deepest_boundary_that_is_held() -> None:
    """A boundary is listed when a hit up to it is valid, whatever became of what is before it."""
    stride = PREFIX_STRIDE_TOKENS
    workers = [worker(name, "prefill") for name in ("all", "first", "late", "old", "none")]
    now = {each.worker_id: each.incarnation for each in workers}

    def held_by(*names: str) -> dict[str, str]:
        return {name: now[name] for name in names} | {"old": "old-before", "gone": "x"}

    holders = [held_by("all", "first"), held_by("all", "late"), held_by("all")]
    runs = {"all": 3 * stride, "first": stride, "late": 2 * stride}
    assert longest_run(holders, workers) == runs
    assert longest_run([], workers) == {}


def test_a_worker_whose_scarcest_pool_is_too_small_is_left_out() -> None:
    """By the arithmetic of the worker itself: a windowed group takes so many blocks at most."""
    shares = (GroupShare(0), GroupShare(1, 4))

    def decode(name: str, num_blocks: tuple[int, int], num_free: tuple[int, int]) -> WorkerSnapshot:
        capacity = Capacity(16, num_blocks, shares, 4096)
        return worker(name, "decode", capacity=capacity, num_free_blocks=num_free)

    fits, short = decode("d", (12, 4), (12, 4)), decode("s", (99, 3), (99, 3))
    assert route(worker("p", "prefill"), fits, short) == ("p", "d")
    assert route(worker("p", "prefill"), short) is None
    empty = decode("e", (99, 9), (99, 0))
    assert route(worker("p", "prefill"), empty, fits) == ("p", "d")


def test_longest_run_counts_in_whole_blocks() -> None:
    """The directory lists every tenth block of 24 tokens: the last within each 256 tokens."""
    odd = worker("w", "both", capacity=Capacity(24, (100,), (GroupShare(0),), 4096))
    assert longest_run([{"w": "w-first"}], [odd]) == {"w": 240}


def longest(*workers: WorkerSnapshot) -> int | None:
    return longest_sequence(workers, lambda capacity: capacity.longest)


def test_the_longest_sequence_is_one_that_both_of_some_pair_hold() -> None:
    def prefill(name: str, length: int, **changes: Any) -> WorkerSnapshot:
        return worker(name, "prefill", max_model_len=length, **changes)

    def decode(name: str, length: int, **changes: Any) -> WorkerSnapshot:
        return worker(name, "decode", max_model_len=length, **changes)

    assert longest() is None
    assert longest(prefill("p", 500)) is None
    pair = prefill("p", 500), decode("d", 300)
    assert longest(*pair) == 300
    # A short worker more takes nothing from the others.
    assert longest(*pair, decode("s", 100), prefill("q", 200)) == 300
    # Those of another capability do not go with these; what fits a pool counts too.
    assert longest(*pair, decode("x", 600, capability_hash="b")) == 300
    assert longest(*pair, worker("b", "both", max_model_len=9000, num_blocks=20)) == 320


@given(
    lengths=st.lists(
        st.tuples(
            st.sampled_from(["prefill", "decode", "both"]),
            st.sampled_from("ab"),
            st.integers(1, 400),
            st.integers(0, 30),
        ),
        max_size=5,
    ),
    num_tokens=st.integers(2, 500),
)
def test_what_is_not_too_long_has_a_route_to_its_end(
    lengths: list[tuple[Role, str, int, int]], num_tokens: int
) -> None:
    """As a new prompt too, of all tokens but one: so attempts go on."""
    workers = [
        worker(f"w{number}", role, capability_hash=key, max_model_len=length, num_blocks=blocks)
        for number, (role, key, length, blocks) in enumerate(lengths)
    ]
    most = longest(*workers)
    first, last = (
        route(*workers, num_prompt_tokens=prompt, num_tokens=num_tokens)
        for prompt in (1, num_tokens - 1)
    )
    if most is not None and num_tokens <= most:
        assert first is not None and last is not None
    if last is None or most is None:
        return
    # One token more than all of them hold may find a prefill worker, which holds the prompt only.
    assert num_tokens - 1 <= most
