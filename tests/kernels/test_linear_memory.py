"""What products of many sizes leave behind in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import torch

from baton.kernels.reference import linear, pack_weight
from baton.shared.engine.host_memory import own_bytes
from tests.device import ROOT, process_environment


def test_memory_does_not_grow_with_the_sizes_of_prompts() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_linear_memory"],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    # Seen: 90 MiB, and 300 when every size's product is kept.
    assert int(run.stdout) < 150 * 2**20


def main() -> None:
    """Prints how many bytes products of 450 sizes take."""
    torch.set_num_threads(1)
    weight = pack_weight(torch.randn(512, 256))
    before = own_bytes()
    for num_rows in range(16, 466):
        linear(torch.randn(num_rows, 256), weight, None)
    sys.stdout.write(f"{own_bytes() - before}\n")


if __name__ == "__main__":
    main()
