"""Every key pattern and TTL of the directory.

The cluster's name is a hash tag: several clusters may share a server, and all keys of one lie in
the same slot, so that a script may touch several of them.

    baton:{c}:workers                           sorted set: worker id → when its record expires
    baton:{c}:worker:<worker id>                hash: incarnation, record (JSON)
    baton:{c}:model                             hash: digest, name, vocab_size of the one model that
                                                the workers serve; lives as long as the last record
    baton:{c}:gateway:<incarnation>             string: written to learn whether writes are taken
    baton:{c}:prefix:<block hash in hex>        hash: worker id → "<expires, ms>:<incarnation>"
    baton:{c}:ledger:<request id>:<sample>      hash: one entry, or the tombstone of one
"""

from __future__ import annotations

import re

WORKER_TTL_S = 3.0
"""A worker publishes its record every 0.5 s; after this long without one it is gone, and with the
last of them the cluster's model."""
GATEWAY_TTL_S = 3.0
"""A gateway writes its key every 0.25 s."""
PREFIX_TTL_S = 60.0
"""A holder publishes what it still holds every 20 s."""
LEDGER_TTL_S = 30.0
"""An owner writes its entries again while the sequence lives."""
TOMBSTONE_TTL_S = 5.0
"""How long a finished attempt keeps late writes away."""

# Outside of this set a name could end the hash tag or mean something in a SCAN pattern.
_CLUSTER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Keys:
    """The keys of one cluster. `ValueError` for a name that cannot be a hash tag."""

    def __init__(self, cluster: str) -> None:
        if not _CLUSTER_NAME.fullmatch(cluster):
            raise ValueError(f"cluster name {cluster!r} is not made of letters, digits, '_.-'")
        self.cluster = cluster
        self._root = f"baton:{{{cluster}}}"
        self.workers = f"{self._root}:workers"
        self.model = f"{self._root}:model"
        self.any_prefix = f"{self._root}:prefix:*"
        self.any_ledger = f"{self._root}:ledger:*"

    def worker(self, worker_id: str) -> str:
        return f"{self._root}:worker:{worker_id}"

    def gateway(self, incarnation: str) -> str:
        return f"{self._root}:gateway:{incarnation}"

    def prefix(self, block_hash: bytes) -> str:
        return f"{self._root}:prefix:{block_hash.hex()}"

    def ledger(self, request_id: str, sample: int) -> str:
        return f"{self._root}:ledger:{request_id}:{sample}"


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
