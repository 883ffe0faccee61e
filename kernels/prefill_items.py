"""Cuts prompt chunks into work items for kernels/split_prefill_attention.py, on the host.

An item is a tile of a chunk's tokens and a stretch of the keys that they see. Where few tokens come
behind many, tiles alone are too few for a GPU's processors; their keys are cut so that about as
many items come out as there is room for, of like length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

ITEM_FIELDS = 9
"""An item: first token, number of tokens, slot, position of the first token, first key, end of
keys; then, of a tile of several items, its own place among sums, that of the tile's first item,
and how many there are. One item alone leaves no sums."""
_LEAST_KEYS = 256
"""Of an item of several: with fewer, adding up costs more than is won."""


def most_items(num_tokens: int, num_rows: int, block_m: int, most_cuts: int) -> int:
    """Items of a step at most, whose chunks have so many tokens in so many rows."""
    return num_tokens // block_m + num_rows + most_cuts


def most_places(most_cuts: int) -> int:
    """Places for sums at most: of tiles longer than a share there are fewer than shares."""
    return 2 * most_cuts


def cut_items(
    tiles: npt.NDArray[np.integer[Any]],
    *,
    block_n: int,
    most_cuts: int,
    window: int = 0,
    least_keys: int = _LEAST_KEYS,
) -> npt.NDArray[np.int32]:
    """Items of the tiles, the longest first; all are needed.

    Args:
        tiles: [NT, 4], from `prefill_tiles`.
        block_n: keys of a tile; an item begins at a multiple of them.
        most_cuts: into so many stretches the step's keys are cut, beside the ends of tiles.
        window: a token sees its last `window` keys; 0: all.

    Returns:
        int32 [N, 9], see ITEM_FIELDS; N at most `most_items`.
    """
    # Not by arrays: of one prompt, which waits for it, this is over before numpy has begun.
    listed = tiles.tolist()
    seen = [_tiles_of_keys(position, num, block_n, window) for _, num, _, position in listed]
    per_item = max(-(-sum(map(len, seen)) // most_cuts), -(-least_keys // block_n))
    items: list[tuple[int, ...]] = []
    first_place = 0
    for (first_token, num_tokens, slot, position), keys in zip(listed, seen, strict=True):
        splits = max(-(-len(keys) // per_item), 1)
        for split in range(splits):
            begin = keys.start + split * len(keys) // splits
            stop = keys.start + (split + 1) * len(keys) // splits
            end = min(stop * block_n, position + num_tokens)
            of_tile = (first_token, num_tokens, slot, position)
            places = (first_place + split, first_place, splits)
            items.append((*of_tile, begin * block_n, end, *places))
        first_place += splits if splits > 1 else 0
    items.sort(key=lambda item: -(-(item[5] - item[4]) // block_n), reverse=True)
    return np.array(items, np.int32).reshape(-1, ITEM_FIELDS)


def _tiles_of_keys(position: int, num_tokens: int, block_n: int, window: int) -> range:
    """What tokens from a position on see, in tiles of `block_n` keys."""
    low = max(position - window + 1, 0) // block_n if window else 0
    return range(low, -(-(position + num_tokens) // block_n))
