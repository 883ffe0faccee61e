"""What a device can do at best, measured: floors are computed from it in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.roofline import Rates

_COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 64 * 2**20}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 256}
_ATTENTION_TFLOP_PER_S = 600.0
"""Of causal attention over a prompt: what the best kernels reach on a Hopper GPU."""


@dataclass(frozen=True)
class Ceilings:
    copy_tb_per_s: float
    """Device to device, bytes read plus bytes written."""
    matmul_tflop_per_s: float
    """bfloat16, 8192³, random data."""
    float8_tflop_per_s: float | None = None
    """Of 8-bit floats with a scale a row, likewise; None: not there."""

    def floor_us(self, num_bytes: float, flop: float = 0.0) -> float:
        """How long so many bytes moved take at least at these rates, or so many operations.

        Reading only can be some percent faster than a copy, so that it stays under its floor.
        """
        return max(num_bytes / self.copy_tb_per_s, flop / self.matmul_tflop_per_s) / 1e6

    @property
    def rates(self) -> Rates:
        return Rates(
            self.copy_tb_per_s * 1e12,
            self.matmul_tflop_per_s * 1e12,
            _ATTENTION_TFLOP_PER_S * 1e12,
            None if self.float8_tflop_per_s is None else self.float8_tflop_per_s * 1e12,
        )


def measure_ceilings(device: torch.device) -> Ceilings:
    """On a CPU, for trials, of so little data that they say nothing."""
    num_bytes, size = _COPY_BYTES[device.type], _MATMUL_SIZE[device.type]
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = median_s if device.type == "cuda" else _median_host_s
    copy_s = seconds(lambda: target.copy_(source))
    a, b = (torch.randn((size, size), dtype=torch.bfloat16, device=device) for _ in range(2))
    matmul_s = seconds(lambda: a @ b)
    float8_tflop_per_s = None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        codes, others = (each.to(torch.float8_e4m3fn) for each in (a, b))
        scale = torch.ones(size, 1, device=device)
        float8_s = seconds(
            lambda: torch._scaled_mm(
                codes,
                others.t(),
                scale_a=scale,
                scale_b=scale.t(),
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        )
        float8_tflop_per_s = 2 * size**3 / float8_s / 1e12
    return Ceilings(
        copy_tb_per_s=2 * num_bytes / copy_s / 1e12,
        matmul_tflop_per_s=2 * size**3 / matmul_s / 1e12,
        float8_tflop_per_s=float8_tflop_per_s,
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


def _median_host_s(run: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        started_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_s)
    return sorted(times)[1]
