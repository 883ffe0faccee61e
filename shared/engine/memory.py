"""How much memory there is, and how many blocks the KV pool gets of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.shared.engine.config import EngineConfig
from baton.shared.engine.host_memory import HostMemory, host_memory, own_bytes
from baton.shared.kv.arrangement import Arrangement
from baton.shared.kv.capacity import GroupShare, blocks_by_pool
from baton.shared.model_files.fields import ModelError

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
    arrangement: Arrangement,
    *,
    ahead_tokens: int,
    max_model_len: int,
    used_bytes: int,
    device: torch.device,
) -> tuple[int, ...]:
    """By pool: the configured number of blocks, else what the machine can spare.

    Pools are cut for sequences of max_model_len; a configured number is that of the first pool, and
    the others follow. On a CPU: four such sequences or 256 MiB, whichever is more, but at most
    1 GiB and half of what is free. On a GPU: all that is left of the engine's share.

    Args:
        ahead_tokens: computed before a windowed group gives blocks back; see `most_blocks`.
        used_bytes: what weights and the largest step take beside the pools.

    Raises:
        ModelError: not even one sequence of max_model_len fits, or the configured number does not
            fit into memory.
    """
    block_size = config.block_size
    shares = arrangement.shares(block_size, ahead_tokens)
    longest = blocks_by_pool(shares, arrangement.num_pools, max_model_len, block_size)
    longest_bytes = _bytes_of(arrangement, longest)
    host = ""
    if device.type == "cuda":
        room = _gpu_room(config, device) - used_bytes - GPU_MARGIN_BYTES
        num_bytes = room
    else:
        free = free_host_memory(config)
        host = f" ({free})"
        room = free.free_bytes - used_bytes
        wanted = max(4 * longest_bytes, _POOL_BYTES)
        num_bytes = min(wanted, _MAX_POOL_BYTES, room // 2)
    if config.num_blocks is not None:
        num_blocks = tuple(-(-config.num_blocks * count // longest[0]) for count in longest)
        if _bytes_of(arrangement, num_blocks) > room:
            sizes = " and ".join(
                f"{count} blocks of {size} bytes"
                for count, size in zip(num_blocks, arrangement.block_bytes, strict=True)
            )
            raise ModelError(
                f"num_blocks: {sizes} do not fit into the {max(0, room)} bytes that are free{host}"
            )
        return num_blocks
    # The zero block behind each pool's last one is a block too.
    usable_bytes = num_bytes - sum(arrangement.block_bytes)
    if usable_bytes < longest_bytes:
        raise ModelError(
            f"max_model_len: a sequence of {max_model_len} tokens needs "
            f"{_needs(arrangement, shares, max_model_len, block_size)}, the pool would have "
            f"{_gib(max(0, usable_bytes))}{host}: {_gib(longest_bytes - usable_bytes)} missing; "
            "set num_blocks or a lower max_model_len"
        )
    if arrangement.num_pools == 1:
        return (usable_bytes // arrangement.block_bytes[0],)
    return tuple(usable_bytes * count // longest_bytes for count in longest)


def _bytes_of(arrangement: Arrangement, num_blocks: Sequence[int]) -> int:
    return sum(map(int.__mul__, num_blocks, arrangement.block_bytes))


def _needs(
    arrangement: Arrangement, shares: Sequence[GroupShare], num_tokens: int, block_size: int
) -> str:
    """What each group needs for one sequence."""
    needs = []
    for group, share in zip(arrangement.groups, shares, strict=True):
        count = share.blocks_for(num_tokens, block_size)
        size = _gib(count * arrangement.block_bytes[share.pool])
        of_group = f" in the group of {group.spec}" if len(shares) > 1 else ""
        needs.append(f"{count} blocks ({size}){of_group}")
    return ", ".join(needs)


def _gpu_room(config: EngineConfig, device: torch.device) -> int:
    """Bytes that the engine may take in all, as far as other processes leave them free."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return min(int(total * config.gpu_memory_utilization), free + own)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
