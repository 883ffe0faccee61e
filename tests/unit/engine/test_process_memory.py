"""What an engine on the CPU takes for itself, seen in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from baton.kernels.reference import linear, pack_weight
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.host_memory import own_bytes
from baton.shared.engine.model_runner import ModelRunner
from tests.device import ROOT, process_environment

MIB = 2**20


@pytest.fixture(scope="module")
def seen() -> Any:
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.engine.test_process_memory"],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def test_nothing_of_torch_s_compiler_is_loaded(seen: Any) -> None:
    """It takes 75 MB, and more than a second of each worker's start."""
    assert seen["compiler"] == []


def test_memory_does_not_grow_with_the_sizes_of_prompts(seen: Any) -> None:
    # Seen: 60 to 90 MiB, and 300 when every size's product is kept.
    assert seen["grown_bytes"] < 150 * MIB


def main() -> None:
    torch.set_num_threads(1)
    ModelRunner(EngineConfig(ROOT / "models" / "demo", device="cpu", num_blocks=1))
    compiler = [name for name in ("torch._dynamo", "sympy") if name in sys.modules]
    weight = pack_weight(torch.randn(512, 256))
    before = own_bytes()
    for num_rows in range(16, 466):
        linear(torch.randn(num_rows, 256), weight, None)
    json.dump({"compiler": compiler, "grown_bytes": own_bytes() - before}, sys.stdout)


if __name__ == "__main__":
    main()
