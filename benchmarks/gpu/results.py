"""Where results go: a file of their kind and the card's name, unless another is given."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from benchmarks.checkout import RESULTS


def result_path(kind: str, given: Path | None = None) -> Path:
    """`given`: a file, or a directory for one; what has no suffix and is no file counts as one. Its
    directory is made."""
    name = f"{kind}_{_card()}.json"
    path = given
    if path is None:
        path = RESULTS / name
    elif path.is_dir() or not (path.suffix or path.is_file()):
        path = path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _card() -> str:
    """As `h100` of `NVIDIA H100 80GB HBM3`."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name().lower().split()
    own = [word for word in words if re.fullmatch(r"[a-z]+\d+[a-z]*", word)]
    return own[0] if own else "_".join(words)
