"""How much memory there is, and how many blocks the KV pool gets of it."""

from __future__ import annotations

import torch

from baton.shared.engine.config import EngineConfig, ModelError
from baton.shared.engine.host_memory import HostMemory, host_memory, own_bytes

_POOL_BYTES = 256 * 2**20
_MAX_POOL_BYTES = 2**30
GPU_MARGIN_BYTES = 3 * 2**29
"""Kept free on a GPU beside all that is counted: the CUDA context, libraries, captured graphs."""


def free_host_memory(config: EngineConfig) -> HostMemory:
    """What an engine on the CPU may still take: of the machine, of this process's control groups,
    and of the share that the configuration gives it."""
    bound = host_memory()
    if config.host_memory_mib is None:
        return bound
    limit = config.host_memory_mib * 2**20
    setter = f"host_memory_mib, a share of {bound.limit}"
    share = HostMemory(max(0, limit - own_bytes()), limit, setter)
    return min(bound, share, key=lambda bound: bound.free_bytes)


def check_weights_fit(config: EngineConfig, weight_bytes: int, device: torch.device) -> None:
    """Before anything big is allocated.

    Raises:
        ModelError: the GPU, or the share of it that the engine may take, is too small.
    """
    if device.type != "cuda":
        return
    room = _gpu_room(config, device)
    if weight_bytes > room:
        raise ModelError(
            f"model: the weights take {_gib(weight_bytes)}, {_gib(room)} of the GPU may be used "
            f"(gpu_memory_utilization {config.gpu_memory_utilization:g}): "
            f"{_gib(weight_bytes - room)} missing"
        )


def choose_num_blocks(
    config: EngineConfig,
    *,
    block_bytes: int,
    max_model_len: int,
    used_bytes: int,
    device: torch.device,
) -> int:
    """The configured number of blocks, else what the machine can spare.

    On a CPU: four sequences of max_model_len or 256 MiB, whichever is more, but at most 1 GiB and
    half of what is free. On a GPU: all that is left of the engine's share.

    Args:
        used_bytes: what weights and the largest step take beside the pool.

    Raises:
        ModelError: not even one sequence of max_model_len fits, or the configured number does not
            fit into memory.
    """
    longest = -(-max_model_len // config.block_size)
    host = ""
    if device.type == "cuda":
        room = _gpu_room(config, device) - used_bytes - GPU_MARGIN_BYTES
        num_bytes = room
    else:
        free = free_host_memory(config)
        host = f" ({free})"
        room = free.free_bytes - used_bytes
        wanted = max(4 * longest * block_bytes, _POOL_BYTES)
        num_bytes = min(wanted, _MAX_POOL_BYTES, room // 2)
    if config.num_blocks is not None:
        if config.num_blocks * block_bytes > room:
            raise ModelError(
                f"num_blocks: {config.num_blocks} blocks of {block_bytes} bytes do not fit "
                f"into the {max(0, room)} bytes that are free{host}"
            )
        return config.num_blocks
    # The zero block behind the last one is a block too.
    num_blocks = max(0, num_bytes // block_bytes - 1)
    if num_blocks < longest:
        missing = (longest + 1) * block_bytes - num_bytes
        raise ModelError(
            f"max_model_len: a sequence of {max_model_len} tokens needs {longest} blocks, "
            f"the pool would have {num_blocks}{host}: {_gib(missing)} missing; "
            "set num_blocks or a lower max_model_len"
        )
    return num_blocks


def _gpu_room(config: EngineConfig, device: torch.device) -> int:
    """Bytes that the engine may take in all, as far as other processes leave them free."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return min(int(total * config.gpu_memory_utilization), free + own)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
