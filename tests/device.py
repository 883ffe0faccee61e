"""Where the engines of the tests compute: on the CPU, or on a GPU with BATON_TEST_DEVICE=cuda.

On a GPU the tests of the CPU path run in float32, over the Triton kernels and the transport `nixl`.
What they ask for themselves goes before what is here. The tests of kernels/ need nothing of this:
they take the GPU where there is one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

DEVICE = os.environ.get("BATON_TEST_DEVICE") or "cpu"
if DEVICE not in ("cpu", "cuda"):
    raise ValueError(f"BATON_TEST_DEVICE: must be cpu or cuda, not {DEVICE!r}")
ON_GPU = DEVICE == "cuda"

PATIENCE = 4.0 if ON_GPU else 1.0
"""Times the limits on waiting: on a GPU a worker takes some 20 s to start, several at once more."""

ENGINE: dict[str, Any] = (
    {
        "device": "cuda",
        "dtype": "float32",
        "kernels": "triton",
        # As on a CPU, not measured; and few graphs, but room for the largest batch of these tests.
        "token_budget": 512,
        "max_num_seqs": 64,
        # Many engines share the GPU. Their pools are small: this is a limit only.
        "gpu_memory_utilization": 0.3,
    }
    if ON_GPU
    else {"device": "cpu"}
)
"""Fields of EngineConfig."""


def process_environment(**more: str) -> dict[str, str]:
    """For the processes that tests start: one thread, the modules of this tree, `ENGINE` by
    environment variables, which flags override."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    # It is for the kernels of this process.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    flags = {f"BATON_{name.upper()}": str(value) for name, value in ENGINE.items()}
    if ON_GPU:
        flags |= {"BATON_TRANSPORT": "nixl", "BATON_NUM_BLOCKS": "512"}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        # Its default is one port for all who ask for none.
        "BATON_HTTP_PORT": "none",
        **flags,
        **more,
    }
