"""What two workers must have in common before one reads the other's blocks."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capability:
    """Equal hashes mean: a block of one is a block of the other, bit for bit."""

    model_digest: str
    dtype: str
    """Of what is computed."""
    cache_dtype: str
    block_size: int
    layout: tuple[str, ...]
    """By cache group, what its blocks hold and how, as the tensors have it (KvCache.layout)."""
    determinism: str
    """`exact` or `consistent`, and what equal bits rest on beside it (docs/determinism.md)."""

    def hash(self) -> str:
        return _hash(self)


# The gateway asks for it again and again.
@functools.lru_cache(maxsize=256)
def _hash(capability: Capability) -> str:
    fields = json.dumps(dataclasses.asdict(capability), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(b"baton.capability.v2\0" + fields.encode()).hexdigest()
