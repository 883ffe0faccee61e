"""What the GPU can do at best, measured: floors are computed from it in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

_COPY_BYTES = 4 * 2**30
_MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Ceilings:
    copy_tb_per_s: float
    """Device to device, bytes read plus bytes written."""
    matmul_tflop_per_s: float
    """bfloat16, 8192³, random data."""

    def floor_us(self, num_bytes: float, flop: float = 0.0) -> float:
        """How long so many bytes moved take at least at these rates, or so many operations.

        Reading only can be some percent faster than a copy, so that it stays under its floor.
        """
        return max(num_bytes / self.copy_tb_per_s, flop / self.matmul_tflop_per_s) / 1e6


def measure_ceilings(device: torch.device) -> Ceilings:
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source))
    size = (_MATMUL_SIZE, _MATMUL_SIZE)
    a, b = (torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2))
    matmul_s = median_s(lambda: a @ b)
    return Ceilings(
        copy_tb_per_s=2 * _COPY_BYTES / copy_s / 1e12,
        matmul_tflop_per_s=2 * _MATMUL_SIZE**3 / matmul_s / 1e12,
    )


def median_s(run: Callable[[], object], *, repetitions: int = 10) -> float:
    """Median seconds of a run on the device, after three that warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(sorted(times)[len(times) // 2])
