"""How much memory there is, what the KV pools get of it, and how long sequences may be then."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from baton.shared.engine.config import AUTO, EngineConfig
from baton.shared.engine.host_memory import HostMemory, host_memory, own_bytes
from baton.shared.kv.pool_sizes import NumBlocks, PoolSizes
from baton.shared.model_files.fields import ModelError

_POOL_BYTES = 256 * 2**20
_MAX_POOL_BYTES = 2**30
_WEIGHTS_OF_HOST = 0.75
"""Of what is free: pools and whoever else is there need some."""
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


def weights_fit(config: EngineConfig, weight_bytes: int, device: torch.device) -> bool:
    """Whether there is room for them: of a GPU alone, or the share of it that the engine may take;
    on a host for more, too."""
    if device.type == "cuda":
        return weight_bytes <= _gpu_room(config, device)
    return weight_bytes <= _WEIGHTS_OF_HOST * free_host_memory(config).free_bytes


def check_weights_fit(config: EngineConfig, weight_bytes: int, device: torch.device) -> None:
    """Before anything big is allocated.

    Raises:
        ModelError: the GPU, or the share of it that the engine may take, is too small.
    """
    if device.type == "cuda" and not weights_fit(config, weight_bytes, device):
        room = _gpu_room(config, device)
        raise ModelError(
            f"model: the weights take {_gib(weight_bytes)}, {_gib(room)} of the GPU may be used "
            f"(gpu_memory_utilization {config.gpu_memory_utilization:g}): "
            f"{_gib(weight_bytes - room)} missing; {_way_out(config, weight_bytes, device)}"
        )


def check_draft_fits(
    config: EngineConfig, draft_bytes: int, target_bytes: int, device: torch.device
) -> None:
    """Before a draft model is loaded whose weights take so much beside the model's.

    Raises:
        ModelError: there is no room for both.
    """
    if device.type == "cuda":
        room = _gpu_room(config, device)
        where = f"of the GPU (gpu_memory_utilization {config.gpu_memory_utilization:g})"
    else:
        host = free_host_memory(config)
        room, where = host.free_bytes, f"of {host}"
    left = max(0, room - target_bytes)
    if draft_bytes > left:
        raise ModelError(
            f"draft_model: its weights take {_gib(draft_bytes)}, {_gib(left)} {where} are left "
            f"beside the model's: {_gib(draft_bytes - left)} missing"
        )


def _way_out(config: EngineConfig, weight_bytes: int, device: torch.device) -> str:
    """Which settings would make weights fit that do not."""
    whole = _gpu_room(replace(config, gpu_memory_utilization=1.0), device)
    if weight_bytes <= whole:
        return "raise gpu_memory_utilization"
    if config.dtype == "float32" and weight_bytes // 2 <= whole:
        return "set dtype to bfloat16, which takes half of that"
    return "no setting makes room on this GPU"


@dataclass(frozen=True, slots=True)
class PoolChoice:
    num_blocks: NumBlocks
    max_model_len: int
    limit: str
    """What kept the pools from holding more, for the log."""


def choose_pools(
    config: EngineConfig,
    sizes: PoolSizes,
    *,
    most_tokens: int,
    used_bytes: int,
    device: torch.device,
    share: float = 1.0,
) -> PoolChoice:
    """The configured number of blocks, else what the machine can spare; and how long sequences may
    be.

    Pools are cut for the longest sequence; a configured number is that of the first pool, and the
    others follow. On a CPU: four such sequences or 256 MiB, whichever is more, but at most 1 GiB
    and half of what is free. On a GPU: all that is left of the engine's share. A pool of slots has
    one for each row of a step and each checkpoint, or as many as there is memory for beside
    configured blocks, or in half of what they share with those that are not.

    Args:
        most_tokens: of the longest sequence; with max_model_len auto, the one that fits may be
            shorter.
        used_bytes: what weights and the largest step take beside the pools.
        share: of what is left, that these pools may have; the rest is for a draft model's.

    Raises:
        ModelError: not even one sequence of that length fits, or a configured number, of blocks,
            sequences or checkpoints, does not fit into memory.
    """
    room = _room(config, used_bytes, device, share)
    choice = _choose_pools(config, sizes, most_tokens, room, device)
    _check_slots(config, sizes, choice)
    return choice


def _choose_pools(
    config: EngineConfig, sizes: PoolSizes, most_tokens: int, room: _Room, device: torch.device
) -> PoolChoice:
    if config.num_blocks is not None:
        return _of_configured_blocks(config, config.num_blocks, sizes, most_tokens, room)

    def pools_for(num_tokens: int) -> NumBlocks:
        need_bytes = sizes.bytes_of(sizes.blocks_for(num_tokens))
        num_bytes = room.most_bytes
        if device.type != "cuda":
            num_bytes = min(num_bytes, max(4 * need_bytes, _POOL_BYTES))
        return sizes.of_bytes(num_bytes, num_tokens)

    longest = sizes.longest(pools_for, most_tokens)
    if not longest or (longest < most_tokens and config.max_model_len != AUTO):
        raise _too_long(sizes, most_tokens, longest, room)
    return PoolChoice(pools_for(longest), longest, room.limit)


def _check_slots(config: EngineConfig, sizes: PoolSizes, choice: PoolChoice) -> None:
    """Raises ModelError: there are fewer slots than were asked for by number."""
    slot_pools = sizes.arrangement.slot_pools
    num_seqs, num_checkpoints = config.max_num_seqs, config.state_checkpoints or 0
    num_asked = (num_seqs or 1) + num_checkpoints
    if not slot_pools or choice.num_blocks[slot_pools[0]] >= num_asked:
        return
    num_slots, slot_bytes = choice.num_blocks[slot_pools[0]], sizes.slot_bytes
    what = f"{num_seqs} sequences" if num_seqs is not None else "a sequence"
    what += f" and {num_checkpoints} checkpoints" if num_checkpoints else ""
    name = "max_num_seqs" if num_seqs is not None else "state_checkpoints"
    raise ModelError(
        f"{name}: {what} need {num_asked} slots for their states, {_gib(num_asked * slot_bytes)}, "
        f"and there is room for {num_slots} of {slot_bytes} bytes: {choice.limit}; {num_slots} "
        f"{'would do' if not num_checkpoints else 'in all would do'}"
    )


@dataclass(frozen=True, slots=True)
class _Room:
    free_bytes: int
    """Left beside weights and the largest step; may be negative."""
    most_bytes: int
    """What pools take of it at most, unless their size is configured."""
    limit: str
    """What keeps them from being larger."""
    host: str
    """What the host has free, and what of it is for another; may be empty on a GPU."""


def _room(config: EngineConfig, used_bytes: int, device: torch.device, share: float) -> _Room:
    beside = "" if share == 1 else f", {1 - share:.0%} of it for the draft model's cache"
    if device.type == "cuda":
        free = int((_gpu_room(config, device) - used_bytes - GPU_MARGIN_BYTES) * share)
        limit = (
            f"{_gib(max(0, free))} are left of the GPU "
            f"(gpu_memory_utilization {config.gpu_memory_utilization:g})"
        )
        return _Room(free, free, limit + beside, beside)
    host = free_host_memory(config)
    free = int((host.free_bytes - used_bytes) * share)
    if free // 2 > _MAX_POOL_BYTES:
        limit = f"on a CPU pools take {_gib(_MAX_POOL_BYTES)} at most, unless num_blocks is set"
        return _Room(free, _MAX_POOL_BYTES, limit, f" ({host}{beside})")
    limit = f"pools take half of what weights leave of {host}{beside}"
    return _Room(free, min(free, free // 2), limit, f" ({host}{beside})")


def _of_configured_blocks(
    config: EngineConfig, num_blocks: int, sizes: PoolSizes, most_tokens: int, room: _Room
) -> PoolChoice:
    """Raises ModelError: they do not fit into memory."""

    def pools_for(num_tokens: int) -> NumBlocks:
        return sizes.of_first(num_blocks, num_tokens, room.free_bytes)

    def pools_in_memory(num_tokens: int) -> NumBlocks | None:
        pools = pools_for(num_tokens)
        return pools if sizes.bytes_of(pools) <= room.free_bytes else None

    longest, limit = most_tokens, f"num_blocks is {num_blocks}"
    if config.max_model_len == AUTO:
        longest = sizes.longest(pools_for, most_tokens)
        if longest and pools_in_memory(longest) is None:
            # Where the first pool's group is windowed, the others are small only for less.
            longest, limit = sizes.longest(pools_in_memory, longest) or longest, room.limit
        if not longest:
            raise ModelError(f"num_blocks: {num_blocks} hold no sequence at all")
    if pools_in_memory(longest) is None:
        arrangement = sizes.arrangement
        shown = " and ".join(
            f"{count} {'slots' if pool in arrangement.slot_pools else 'blocks'} of {size} bytes"
            for pool, (count, size) in enumerate(
                zip(pools_for(longest), arrangement.block_bytes, strict=True)
            )
        )
        raise ModelError(
            f"num_blocks: {shown} do not fit into the {max(0, room.free_bytes)} bytes that are "
            f"free{room.host}"
        )
    return PoolChoice(pools_for(longest), longest, limit)


def _too_long(sizes: PoolSizes, num_tokens: int, longest: int, room: _Room) -> ModelError:
    # Below zero where the engine has no room for what it needs beside the pools.
    usable_bytes = room.most_bytes - sum(sizes.arrangement.block_bytes)
    need_bytes = sizes.bytes_of(sizes.blocks_for(num_tokens))
    way_out = f"not even {sizes.block_size} tokens fit beside the weights"
    if longest:
        way_out = (
            f"set max_model_len to {AUTO}, which takes the longest that fits, {longest} now, or "
            "to less, or set num_blocks"
        )
    return ModelError(
        f"max_model_len: a sequence of {num_tokens} tokens needs {_needs(sizes, num_tokens)}, "
        f"the pool would have {_gib(max(0, usable_bytes))}{room.host}: "
        f"{_gib(max(0, need_bytes - usable_bytes))} missing; {way_out}"
    )


def _needs(sizes: PoolSizes, num_tokens: int) -> str:
    """What each group needs for one sequence."""
    shares, needs = sizes.shares(), []
    for group, share in zip(sizes.arrangement.groups, shares, strict=True):
        count = share.blocks_for(num_tokens, sizes.block_size)
        size = _gib(count * sizes.arrangement.block_bytes[share.pool])
        of_group = f" in the group of {group.spec}" if len(shares) > 1 else ""
        what = f"{count} blocks" if group.spec.grows else "a slot"
        needs.append(f"{what} ({size}){of_group}")
    return ", ".join(needs)


def _gpu_room(config: EngineConfig, device: torch.device) -> int:
    """Bytes that the engine may take in all, as far as other processes leave them free."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return min(int(total * config.gpu_memory_utilization), free + own)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
