"""The block pool's memory: one flat run of bytes, seen as one tensor per cache group.

Block ids are common to all groups: a block belongs to one group at a time, so every group's blocks
have the same number of bytes. Behind the last block lies one more that stays zero and has no id in
any block table; attention reads it where a block table ends before its key tile does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.shared.engine.cache_spec import CacheGroup


class KvCache:
    """KV blocks of all layers.

    Attributes:
        memory: uint8 [required_bytes], contiguous.
        tensors: by group, [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim].
        padded_tensors: by group, the same with the zero block at index `num_blocks`.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        memory: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Takes `memory` (uint8 [at least required_bytes], 64-byte aligned) or allocates it.

        Raises:
            ValueError: the memory does not fit, or the groups' blocks differ in bytes.
        """
        self.groups = tuple(groups)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.block_bytes = block_bytes(groups, block_size, dtype)
        num_bytes = self.required_bytes(groups, num_blocks, block_size, dtype)
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
        self.memory[num_blocks * self.block_bytes :].zero_()
        self.padded_tensors = [
            self.memory.view(dtype).view(num_blocks + 1, *group.block_shape(block_size))
            for group in self.groups
        ]
        self.tensors = [tensor[:num_blocks] for tensor in self.padded_tensors]

    @staticmethod
    def required_bytes(
        groups: Sequence[CacheGroup], num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> int:
        """Bytes of memory for `num_blocks` blocks and the zero block behind them."""
        return (num_blocks + 1) * block_bytes(groups, block_size, dtype)

    def block_words(self, block_ids: Sequence[int], group: int = 0) -> torch.Tensor:
        """A copy of blocks as 32-bit words: int32 [len(block_ids), num_kv_heads, words]."""
        num_heads = self.groups[group].spec.num_kv_heads
        words = self.memory.view(torch.int32).view(self.num_blocks + 1, num_heads, -1)
        index = torch.tensor(list(block_ids), dtype=torch.int64, device=words.device)
        return words.index_select(0, index)


def block_bytes(groups: Sequence[CacheGroup], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block, the same for every group.

    Raises:
        ValueError: the groups' blocks differ in bytes.
    """
    sizes = {group.block_bytes(block_size, dtype.itemsize) for group in groups}
    if len(sizes) != 1:
        raise ValueError(f"cache groups differ in block bytes: {sorted(sizes)}")
    return sizes.pop()
