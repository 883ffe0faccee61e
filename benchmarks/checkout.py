"""Where things are in the checkout, and how processes started from here import it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEMO_MODEL = ROOT / "models" / "demo"


def set_import_path() -> None:
    """For processes that are started from here: this tree, installed or not."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(ROOT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])
