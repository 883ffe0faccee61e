"""What the pool gets of a host's memory, and what is said when that is too little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.shared.engine import memory
from baton.shared.engine.config import EngineConfig, ModelError
from baton.shared.engine.host_memory import HostMemory

MIB = 2**20
CPU = torch.device("cpu")
GROUP = "/sys/fs/cgroup/pod/memory.max"


def num_blocks(free_mib: int, monkeypatch: pytest.MonkeyPatch, **config: int) -> int:
    """Of 1 MiB each, in a group of 800 MiB, in which this process has taken 100 MiB."""
    bound = HostMemory(free_mib * MIB, 800 * MIB, GROUP)
    monkeypatch.setattr(memory, "host_memory", lambda: bound)
    monkeypatch.setattr(memory, "own_bytes", lambda: 100 * MIB)
    return memory.choose_num_blocks(
        EngineConfig(Path("model"), **config),  # type: ignore[arg-type]
        block_bytes=MIB,
        max_model_len=320,
        used_bytes=50 * MIB,
        device=CPU,
    )


def test_half_of_what_the_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    # The zero block takes one.
    assert num_blocks(250, monkeypatch) == 99


def test_no_more_than_this_worker_s_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_blocks(700, monkeypatch, host_memory_mib=250) == 49
    assert num_blocks(150, monkeypatch, host_memory_mib=700) == 49


def test_a_refusal_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=rf"60 MiB free of 800 MiB \({GROUP}\)"):
        num_blocks(60, monkeypatch)
    with pytest.raises(ModelError, match=rf"num_blocks: 11 .* free of 800 MiB \({GROUP}\)"):
        num_blocks(60, monkeypatch, num_blocks=11)
    share = rf"30 MiB free of 130 MiB \(host_memory_mib, a share of 800 MiB \({GROUP}\)\)"
    with pytest.raises(ModelError, match=share):
        num_blocks(600, monkeypatch, host_memory_mib=130)
