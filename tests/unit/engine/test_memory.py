"""What the pool gets of a host's memory, and what is said when that is too little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baton.shared.engine import memory
from baton.shared.engine.config import EngineConfig, most_checkpoints, most_num_seqs
from baton.shared.engine.host_memory import HostMemory
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.arrangement import Arrangement
from baton.shared.kv.cache_spec import CacheGroup, Full, Sliding, State, StateTensor
from baton.shared.kv.pool_sizes import PoolSizes
from baton.shared.model_files.fields import ModelError

MIB = 2**20
CPU = torch.device("cpu")
GROUP = "/sys/fs/cgroup/pod/memory.max"


ONE_GROUP = Arrangement((CacheGroup(Full(1, 16), (0,)),), (0,), (MIB,), 0.0)
TWO_POOLS = Arrangement(
    (CacheGroup(Full(1, 16), (0,)), CacheGroup(Sliding(1, 8, 64), (1,))),
    (0, 1),
    (MIB, 2 * MIB),
    0.0,
)
STATE = State(1, (StateTensor("sum", (MIB // 2,), "float32"),))
"""2 MiB."""
WITH_STATES = Arrangement(
    (CacheGroup(Full(1, 16), (0,)), CacheGroup(STATE, (1,))), (0, 1), (MIB, 2 * MIB), 0.0
)
STATES_ALONE = Arrangement((CacheGroup(STATE, (0,)),), (0,), (2 * MIB,), 0.0)


def choose(
    free_mib: int,
    monkeypatch: pytest.MonkeyPatch,
    arrangement: Arrangement = ONE_GROUP,
    *,
    most_tokens: int = 320,
    **config: Any,
) -> memory.PoolChoice:
    """With blocks of 1 MiB, in a group of 800 MiB, in which this process has taken 100 MiB."""
    bound = HostMemory(free_mib * MIB, 800 * MIB, GROUP)
    monkeypatch.setattr(memory, "host_memory", lambda: bound)
    monkeypatch.setattr(memory, "own_bytes", lambda: 100 * MIB)
    engine = EngineConfig(Path("model"), **config)
    return memory.choose_pools(
        engine,
        PoolSizes(
            arrangement,
            block_size=16,
            ahead_tokens=16,
            in_flight_tokens=1,
            max_num_seqs=most_num_seqs(engine),
            num_checkpoints=most_checkpoints(engine),
        ),
        most_tokens=most_tokens,
        used_bytes=50 * MIB,
        device=CPU,
    )


def num_blocks(*args: Any, **options: Any) -> tuple[int, ...]:
    choice = choose(*args, **options)
    assert choice.max_model_len == 320
    return choice.num_blocks


def test_half_of_what_the_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    # The zero block takes one.
    assert num_blocks(250, monkeypatch) == (99,)


def test_no_more_than_this_worker_s_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_blocks(700, monkeypatch, host_memory_mib=250) == (49,)
    assert num_blocks(150, monkeypatch, host_memory_mib=700) == (49,)


def test_a_refusal_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=rf"60 MiB free of 800 MiB \({GROUP}\)"):
        num_blocks(60, monkeypatch)
    with pytest.raises(ModelError, match=rf"num_blocks: 11 .* free of 800 MiB \({GROUP}\)"):
        num_blocks(60, monkeypatch, num_blocks=11)
    share = rf"30 MiB free of 130 MiB \(host_memory_mib, a share of 800 MiB \({GROUP}\)\)"
    with pytest.raises(ModelError, match=share):
        num_blocks(600, monkeypatch, host_memory_mib=130)


def test_pools_are_cut_for_the_longest_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs 20 blocks of the first pool, and of the second its window, what is computed ahead of
    it, and what the borders of blocks cost."""
    first, second = num_blocks(400, monkeypatch, TWO_POOLS)
    assert (first, second) == (107, 32)
    assert num_blocks(400, monkeypatch, TWO_POOLS, num_blocks=40) == (40, 12)


def test_who_does_not_fit_is_told_what_each_group_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError) as caught:
        num_blocks(90, monkeypatch, TWO_POOLS)
    message = str(caught.value)
    assert "20 blocks (0.02 GiB) in the group of Full" in message
    assert "6 blocks (0.01 GiB) in the group of Sliding" in message
    assert "missing" in message and "\n" not in message


def test_a_refusal_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """(60 - 50) / 2 MiB, less the zero block."""
    with pytest.raises(ModelError, match="max_model_len to auto, .* fits, 64 now, or to less"):
        num_blocks(60, monkeypatch)
    assert choose(60, monkeypatch, max_model_len="auto").max_model_len == 64
    # There is none where not even a block has room.
    for length in (None, "auto"):
        with pytest.raises(ModelError, match="missing; not even 16 tokens fit") as caught:
            choose(50, monkeypatch, max_model_len=length)
        assert "auto" not in str(caught.value)


def test_what_is_missing_is_not_the_pools_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is not even the room that the engine needs beside them."""
    # 22 blocks with the zero block, and what goes beyond the 974 MiB that are free.
    with pytest.raises(ModelError, match=r"would have 0\.00 GiB .*: 1\.02 GiB missing; not even"):
        choose(50 - 1024, monkeypatch)


@pytest.mark.parametrize("arrangement", [ONE_GROUP, TWO_POOLS])
def test_auto_takes_what_would_not_be_refused(
    arrangement: Arrangement, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = set()
    for free_mib in (66, 70, 90, 110, 400):
        choice = choose(free_mib, monkeypatch, arrangement, max_model_len="auto")
        longest = choice.max_model_len
        lengths.add(longest)
        assert choose(free_mib, monkeypatch, arrangement, most_tokens=longest) == choice
        if longest < 320:
            with pytest.raises(ModelError, match=f"the longest that fits, {longest} now"):
                choose(free_mib, monkeypatch, arrangement, most_tokens=longest + 1)
    assert max(lengths) == 320 and len(lengths) > 2


def test_auto_says_what_limits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    auto: dict[str, Any] = {"max_model_len": "auto", "most_tokens": 100_000}
    assert "half of what weights leave of 90 MiB free" in choose(90, monkeypatch, **auto).limit
    assert "1.00 GiB at most" in choose(9000, monkeypatch, **auto).limit
    assert choose(9000, monkeypatch, **auto).max_model_len == 1023 * 16
    assert choose(90, monkeypatch, num_blocks=3, **auto).limit == "num_blocks is 3"


def test_auto_with_a_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    auto: dict[str, Any] = {"max_model_len": "auto", "most_tokens": 100_000}
    assert choose(400, monkeypatch, num_blocks=40, **auto).max_model_len == 640
    choice = choose(400, monkeypatch, TWO_POOLS, num_blocks=40, **auto)
    # Of the second pool what a sequence takes that fills the first.
    assert (choice.num_blocks, choice.max_model_len) == ((40, 6), 640)
    windowed_first = replace(
        TWO_POOLS,
        groups=TWO_POOLS.groups[::-1],
        block_bytes=TWO_POOLS.block_bytes[::-1],
    )
    # Any length would do for the first; the second has to fit into memory.
    choice = choose(400, monkeypatch, windowed_first, num_blocks=6, **auto)
    assert choice.num_blocks[0] == 6 and choice.num_blocks[1] <= 350 - 2 * 6
    assert choice.max_model_len == choice.num_blocks[1] * 16 == 338 * 16
    with pytest.raises(ModelError, match="num_blocks: 400 blocks .* do not fit"):
        choose(400, monkeypatch, num_blocks=400, **auto)


def test_there_is_a_slot_for_each_row_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is configured for blocks, or before what is left for them."""
    assert num_blocks(400, monkeypatch, WITH_STATES, num_blocks=40, max_num_seqs=7) == (40, 7)
    # Of 175 MiB a block and a slot stay zero.
    assert num_blocks(400, monkeypatch, WITH_STATES, max_num_seqs=7) == (175 - 3 - 2 * 7, 7)


def test_states_take_half_of_the_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_blocks(400, monkeypatch, WITH_STATES) == (86, 43)
    assert num_blocks(400, monkeypatch, STATES_ALONE) == (86,), "or all of it"
    assert num_blocks(400, monkeypatch, STATES_ALONE, max_num_seqs=85) == (85,)


def test_checkpoints_have_slots_beside_those_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, num_slots in (({}, 8), ({"state_checkpoints": None}, 10)):
        config: dict[str, Any] = {"num_blocks": 40, "max_num_seqs": 8, **asked}
        assert num_blocks(400, monkeypatch, WITH_STATES, **config) == (40, num_slots)
    wanted: dict[str, Any] = {"state_checkpoints": None}
    assert num_blocks(400, monkeypatch, WITH_STATES, **wanted) == (86, 43), "as many as fit"


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"max_num_seqs": 44}, "max_num_seqs: 44 sequences need 44 slots .* 0.09 GiB.* 43 would"),
        (
            {"max_num_seqs": 40, "state_checkpoints": 4},
            "max_num_seqs: 40 sequences and 4 checkpoints need 44 slots .* room for 43 of 2097152",
        ),
        ({"state_checkpoints": 43}, "state_checkpoints: a sequence and 43 checkpoints need 44"),
    ],
)
def test_slots_that_were_asked_for_by_number_and_do_not_fit(
    asked: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=problem):
        num_blocks(400, monkeypatch, WITH_STATES, **asked)
    assert num_blocks(400, monkeypatch, WITH_STATES, max_num_seqs=40, state_checkpoints=3)[1] == 43


@pytest.mark.parametrize(("num_slots", "rows"), [(320, 256), (319, 255), (43, 34), (2, 1), (1, 1)])
def test_rows_and_checkpoints_share_what_fits(num_slots: int, rows: int) -> None:
    sizes = PoolSizes(STATES_ALONE, 16, 16, 1, max_num_seqs=256, num_checkpoints=64)
    assert sizes.rows_of(num_slots) == rows


@pytest.mark.parametrize(("num_asked", "rows"), [(64, 36), (20, 80), (99, 1)])
def test_checkpoints_that_were_asked_for_by_number_are_there(num_asked: int, rows: int) -> None:
    """Rows that were not are fewer by them."""
    sizes = PoolSizes(STATES_ALONE, 16, 16, 1, max_num_seqs=256, num_checkpoints=num_asked)
    assert sizes.rows_of(100, num_asked) == rows < sizes.rows_of(100)


def test_the_longest_sequence_has_room_beside_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    # 25 MiB: 20 blocks and a slot, and what stays zero.
    assert num_blocks(100, monkeypatch, WITH_STATES) == (20, 1)
    with pytest.raises(ModelError) as caught:
        num_blocks(99, monkeypatch, WITH_STATES)
    assert "20 blocks (0.02 GiB) in the group of Full" in str(caught.value)
    assert "a slot (0.00 GiB) in the group of State" in str(caught.value)


def test_configured_blocks_and_their_slots_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_blocks(400, monkeypatch, WITH_STATES, num_blocks=20) == (20, 165)
    wanted = "num_blocks: 349 blocks of 1048576 bytes and 1 slots of 2097152 bytes do not fit"
    with pytest.raises(ModelError, match=wanted):
        num_blocks(400, monkeypatch, WITH_STATES, num_blocks=349)


@pytest.mark.parametrize(
    ("config", "weights_gib", "way_out"),
    [
        ({"gpu_memory_utilization": 0.5}, 50, "10.00 GiB missing; raise gpu_memory_utilization"),
        ({"dtype": "float32"}, 100, "28.00 GiB missing; set dtype to bfloat16, which takes half"),
        ({"dtype": "bfloat16"}, 100, "28.00 GiB missing; no setting makes room on this GPU"),
        ({"dtype": "float32"}, 200, "128.00 GiB missing; no setting makes room on this GPU"),
    ],
)
def test_weights_that_the_gpu_does_not_hold(
    config: dict[str, Any], weights_gib: int, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (78 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    fields = {"gpu_memory_utilization": 0.9, **config}
    with pytest.raises(ModelError) as caught:
        memory.check_weights_fit(
            EngineConfig(Path("nowhere"), **fields), weights_gib * 2**30, torch.device("cuda")
        )
    assert way_out in str(caught.value)


def test_steps_whose_memory_is_measured() -> None:
    """With states also one of as many prompts as begin a tile of their own."""

    def lengths(arrangement: Arrangement, num_rows: int, num_tokens: int) -> list[list[int]]:
        runner: Any = SimpleNamespace(max_num_seqs=num_rows, groups=arrangement.groups)
        return list(ModelRunner._largest_steps(runner, num_tokens))

    assert lengths(ONE_GROUP, 64, 512) == [[512]]
    assert lengths(WITH_STATES, 64, 512) == [[512], [386] + [2] * 63]
    assert lengths(STATES_ALONE, 64, 9) == [[9], [3, 2, 2, 2]]
    assert lengths(STATES_ALONE, 64, 3) == lengths(STATES_ALONE, 1, 3) == [[3]]
