"""How much shared memory a program may have, on which the sizes of tiles depend."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

HOPPER = 232_448


@cache
def shared_bytes(device: torch.device) -> int:
    """Of the device's multiprocessors for one program; in the interpreter, as of an H100."""
    if device.type != "cuda":
        return HOPPER
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
