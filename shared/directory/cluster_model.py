"""Which model a cluster serves.

One model, that of its first live worker. As long as one of its workers lives, a worker of another
model is refused; once all are gone, the next one that registers sets the model anew (workers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.shared.directory.connection import DirectoryMisconfigured

_SHOWN_DIGITS = 18
"""Of a digest, for people; `dummy-` may be some of them."""


@dataclass(frozen=True, slots=True)
class ClusterModel:
    digest: str
    name: str
    """As the first of its workers calls it."""
    vocab_size: int

    @classmethod
    def from_fields(cls, fields: Sequence[str | None]) -> ClusterModel | None:
        """Of digest, name and vocab_size as the directory has them; None when there is none."""
        digest, name, vocab_size = fields if fields else (None, None, None)
        if not digest:
            return None
        is_number = vocab_size is not None and vocab_size.isdecimal()
        return cls(digest, name or "", int(vocab_size or 0) if is_number else 0)

    def __str__(self) -> str:
        return shown_model(self.name, self.digest)


def shown_model(name: str, digest: str) -> str:
    return f"{name!r} (digest {digest[:_SHOWN_DIGITS]})"


class OtherModel(DirectoryMisconfigured):
    """The cluster serves another model. The message names both."""

    def __init__(self, cluster: str, served: ClusterModel, own: str) -> None:
        super().__init__(
            f"cluster {cluster!r} serves model {served}, not {own}: stop all of its workers "
            "first, or name another --cluster"
        )
