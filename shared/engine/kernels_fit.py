"""Kernels that a GPU has no room for: said when a worker starts, in words that help."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from baton.shared.engine.config import DeviceError


@contextmanager
def kernels_fit(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Around a runner's first steps, which load all kernels.

    Raises:
        DeviceError: one takes more than a multiprocessor of the device has.
    """
    try:
        yield
    except Exception as error:
        problem = _too_large(error)
        if problem is None:
            raise
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the device"
        way_out = "set kernels to torch for the reference, which is slow on a GPU"
        if dtype == torch.float32:
            way_out = f"set dtype to bfloat16, which takes less, or {way_out}"
        raise DeviceError(
            f"kernels: at this model's sizes, in {str(dtype).removeprefix('torch.')}, one takes "
            f"{problem.required} of {problem.name}, and {name} has {problem.limit}; {way_out}"
        ) from error


def _too_large(error: Exception) -> Any:
    """Triton's error, if it is that one."""
    errors = sys.modules.get("triton.runtime.errors")
    return error if errors and isinstance(error, errors.OutOfResources) else None
