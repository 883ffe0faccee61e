from __future__ import annotations

from baton.services.launcher.memory_share import worker_share_mib

GIB = 2**30


def test_workers_share_what_gateways_and_valkey_leave() -> None:
    assert worker_share_mib(GIB, num_workers=2, num_gateways=1) == (1024 - 128) // 2
    assert worker_share_mib(GIB, num_workers=3, num_gateways=2) == (1024 - 224) // 3


def test_there_is_always_a_share_to_name() -> None:
    """A worker says better than the launcher what does not fit into it."""
    assert worker_share_mib(10, num_workers=2, num_gateways=1) == 1
    assert worker_share_mib(GIB, num_workers=0, num_gateways=1) > 1
