"""What the pool gets of a host's memory, and what is said when that is too little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.shared.engine import memory
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.host_memory import HostMemory
from baton.shared.kv.arrangement import Arrangement
from baton.shared.kv.cache_spec import CacheGroup, Full, Sliding
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


def num_blocks(
    free_mib: int,
    monkeypatch: pytest.MonkeyPatch,
    arrangement: Arrangement = ONE_GROUP,
    **config: int,
) -> tuple[int, ...]:
    """Of 1 MiB each, in a group of 800 MiB, in which this process has taken 100 MiB."""
    bound = HostMemory(free_mib * MIB, 800 * MIB, GROUP)
    monkeypatch.setattr(memory, "host_memory", lambda: bound)
    monkeypatch.setattr(memory, "own_bytes", lambda: 100 * MIB)
    return memory.choose_num_blocks(
        EngineConfig(Path("model"), **config),  # type: ignore[arg-type]
        arrangement,
        ahead_tokens=16,
        max_model_len=320,
        used_bytes=50 * MIB,
        device=CPU,
    )


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
