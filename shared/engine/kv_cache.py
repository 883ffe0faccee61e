"""The block pools' memory: one flat run of bytes, seen as one tensor per cache group.

Pools lie one after another. Block ids count from 0 in each pool and are common to the groups that
share it: a block belongs to one group at a time. Behind the last block of a pool lies one more that
stays zero; attention reads it where a block table has a hole, or ends before its key tile does.

A slot, the block of a group of states, has tensors of several dtypes: a view of all slots for each.
So has a block of keys and values in 8 bits: their codes, and a byte of scale for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from baton.kernels import reference_float8
from baton.shared.kv.arrangement import Arrangement
from baton.shared.kv.cache_spec import CacheSpec, Full, Sliding, State

_ALIGNMENT_BYTES = 256
"""Of a pool's first block, and of the whole."""


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """Where a pool's blocks lie."""

    offset_bytes: int
    num_blocks: int
    """Without the zero block behind them."""
    block_bytes: int

    @property
    def end_bytes(self) -> int:
        """Of the zero block."""
        return self.offset_bytes + (self.num_blocks + 1) * self.block_bytes


class SlotCopy(NamedTuple):
    """What one slot of a group of states holds becomes another's."""

    group: int
    source: int
    target: int


class KvCache:
    """KV blocks of all layers.

    Attributes:
        memory: uint8 [required_bytes], contiguous.
        pools: by pool, where its blocks lie in it.
        tensors: by group, [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]; of a
            group of latents [num_blocks, 1, num_layers, 1, block_size, rank + rope_dim]; of keys
            and values in 8 bits uint8 [num_blocks, num_kv_heads, bytes]; of a group of states uint8
            [num_slots, num_layers, num_kv_heads, bytes].
        padded_tensors: by group, the same with the zero block at index `num_blocks`.
        caches: by group, what a model's layers take: the padded tensor; of 8 bits its codes,
            float8_e4m3fn [num_blocks + 1, num_kv_heads, num_layers, 2, block_size, head_dim], with
            the scales behind those of each head; of a group of states name →
            [num_slots + 1, num_kv_heads, num_layers, *shape], in the tensor's own dtype; one
            layer's heads lie one after another.
    """

    def __init__(
        self,
        arrangement: Arrangement,
        num_blocks: Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        memory: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Takes `memory` (uint8 [at least required_bytes], 64-byte aligned) or allocates it.

        num_blocks: by pool. dtype: of what has none of its own, and of what is computed with it.

        Raises:
            ValueError: the memory does not fit.
        """
        self.arrangement = arrangement
        self.groups = arrangement.groups
        self.block_size = block_size
        self.dtype = dtype
        self.pools = _lay_out(arrangement, num_blocks)
        num_bytes = self.required_bytes(arrangement, num_blocks)
        if memory is None:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
            raise ValueError("pool memory must be one contiguous run of uint8")
        if memory.numel() < num_bytes or memory.data_ptr() % 64:
            raise ValueError(
                f"pool memory must be 64-byte aligned and hold {num_bytes} bytes, "
                f"not {memory.numel()}"
            )
        self.memory = memory[:num_bytes]
        for pool in self.pools:
            self.memory[pool.end_bytes - pool.block_bytes : pool.end_bytes].zero_()
        self.padded_tensors = [
            self._bytes_of(group)
            .view(dtype if _has_plain_numbers(each.spec) else torch.uint8)
            .view(self.pool_of(group).num_blocks + 1, *each.block_shape(block_size))
            for group, each in enumerate(self.groups)
        ]
        self.tensors = [tensor[:-1] for tensor in self.padded_tensors]
        self.caches: list[torch.Tensor | Mapping[str, torch.Tensor]] = [
            _cache_of(each.spec, tensor, block_size)
            for each, tensor in zip(self.groups, self.padded_tensors, strict=True)
        ]

    @staticmethod
    def required_bytes(arrangement: Arrangement, num_blocks: Sequence[int]) -> int:
        """Bytes of memory for so many blocks by pool, and the zero block behind each."""
        end = _lay_out(arrangement, num_blocks)[-1].end_bytes
        return -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    def pool_of(self, group: int) -> PoolMemory:
        return self.pools[self.arrangement.pools[group]]

    def typed(self, group: int) -> list[torch.Tensor]:
        """What a group's blocks hold, each [num_blocks, …] in its own dtype: views."""
        cache = self.caches[group]
        if not isinstance(cache, torch.Tensor):
            tensors = list(cache.values())
        elif cache.dtype == torch.float8_e4m3fn:
            # Codes as integers, for which there is arithmetic.
            tensors = [cache.view(torch.int8), reference_float8.exponents_of(cache)]
        else:
            tensors = [cache]
        return [tensor[:-1] for tensor in tensors]

    def words(self, group: int) -> torch.Tensor:
        """A group's blocks as 32-bit words: int32 [num_blocks + 1, num_pieces, words], a view."""
        num_pieces = self.groups[group].num_pieces
        blocks = self._bytes_of(group).view(torch.int32)
        return blocks.view(self.pool_of(group).num_blocks + 1, num_pieces, -1)

    def block_words(self, block_ids: Sequence[int], group: int = 0) -> torch.Tensor:
        """A copy of blocks as 32-bit words: int32 [len(block_ids), num_pieces, words]."""
        words = self.words(group)
        index = torch.tensor(list(block_ids), dtype=torch.int64, device=words.device)
        return words.index_select(0, index)

    def copy_slots(self, copies: Sequence[SlotCopy]) -> None:
        for group, source, target in copies:
            slots = self.tensors[group]
            slots[target].copy_(slots[source], non_blocking=True)

    def layout(self) -> tuple[str, ...]:
        """By group: what its blocks hold, as the tensors have it; equal for caches whose blocks
        are alike."""
        return tuple(
            json.dumps(
                {
                    "spec": repr(each.spec),
                    "layers": each.layer_ids,
                    "axes": each.axes(self.block_size),
                    "strides": self.tensors[group].stride(),
                    "pool": self.arrangement.pools[group],
                    **self._layout_of_bytes(group),
                }
            )
            for group, each in enumerate(self.groups)
        )

    def _layout_of_bytes(self, group: int) -> dict[str, object]:
        """What lies where in a block whose axes say only how many bytes it has."""
        cache = self.caches[group]
        if not isinstance(cache, torch.Tensor):
            states = {name: (view.shape[1:], view.stride()) for name, view in cache.items()}
            return {"states": states}
        if cache.dtype != torch.float8_e4m3fn:
            return {}
        scales = reference_float8.exponents_of(cache)
        first = scales.storage_offset() - cache.storage_offset()
        return {"codes": cache.stride(), "scales": (first, scales.stride())}

    def _bytes_of(self, group: int) -> torch.Tensor:
        pool = self.pool_of(group)
        return self.memory[pool.offset_bytes : pool.end_bytes]


def _has_plain_numbers(spec: CacheSpec) -> bool:
    return spec.grows and not (isinstance(spec, Full | Sliding) and spec.is_float8)


def _cache_of(
    spec: CacheSpec, blocks: torch.Tensor, block_size: int
) -> torch.Tensor | Mapping[str, torch.Tensor]:
    if isinstance(spec, State):
        return _state_views(spec, blocks)
    if isinstance(spec, Full | Sliding) and spec.is_float8:
        return reference_float8.codes_of(blocks, block_size, spec.head_dim)
    return blocks


def _state_views(spec: State, slots: torch.Tensor) -> dict[str, torch.Tensor]:
    """slots: uint8 [num_slots + 1, num_layers, num_kv_heads, bytes]."""
    views = {}
    for tensor, start in zip(spec.tensors, spec.offsets_bytes(), strict=False):
        part = slots[..., start : start + tensor.num_bytes].view(getattr(torch, tensor.dtype))
        views[tensor.name] = part.view(*slots.shape[:-1], *tensor.shape).transpose(1, 2)
    return views


def _lay_out(arrangement: Arrangement, num_blocks: Sequence[int]) -> tuple[PoolMemory, ...]:
    pools: list[PoolMemory] = []
    end = 0
    for count, block_bytes in zip(num_blocks, arrangement.block_bytes, strict=True):
        offset = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        pools.append(PoolMemory(offset, count, block_bytes))
        end = pools[-1].end_bytes
    return tuple(pools)
