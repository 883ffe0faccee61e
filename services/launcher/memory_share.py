"""How the memory of this machine, or of the launcher's control group, is shared out. Pure."""

from __future__ import annotations

# What they take at rest, and some more for many streams.
_GATEWAY_BYTES = 96 * 2**20
_VALKEY_BYTES = 32 * 2**20


def worker_share_mib(free_bytes: int, *, num_workers: int, num_gateways: int) -> int:
    """What each worker may take in all, of what is free before any role has started; at least 1.

    Workers that start together would each take for themselves what all of them see free.
    """
    others = num_gateways * _GATEWAY_BYTES + _VALKEY_BYTES
    return max(1, (free_bytes - others) // max(1, num_workers) // 2**20)
