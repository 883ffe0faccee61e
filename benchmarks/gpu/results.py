"""Where results go: a file of their kind and the card's name, unless another is given."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from benchmarks.checkout import RESULTS


def results_name(kind: str) -> str:
    """Of a file of results on this machine's card."""
    return f"{kind}_{_card()}.json"


def result_path(given: Path | None, name: str) -> Path:
    """`given`: a file, or a directory for one of that name; what has no suffix and is no file
    counts as one. The directory is made."""
    path = RESULTS if given is None else given
    if path.is_dir() or not (path.suffix or path.is_file()):
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
