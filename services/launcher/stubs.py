"""Whether a checkout's stubs are those of its protos/: after a pull they may be older, and then
calls fail in ways that do not say why. As a program: prints what make keeps beside new stubs."""

from __future__ import annotations

import hashlib
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def contract_digest(root: Path = _ROOT) -> str:
    """Of all that stubs are made of."""
    files = sorted(root.glob("protos/baton/v1/*.proto"))
    return hashlib.sha256(b"\0".join(each.read_bytes() for each in files)).hexdigest()


def why_stale(root: Path = _ROOT) -> str | None:
    """What is wrong; None: nothing, or this is no checkout, or none whose stubs make has made."""
    made = root / "shared/gen/.generated"
    made_of = made.read_text().strip() if made.exists() else ""
    if not made_of or made_of == contract_digest(root):
        return None
    return "protos/ has changed since the stubs were made of it: run `make protos`"


if __name__ == "__main__":
    print(contract_digest())
