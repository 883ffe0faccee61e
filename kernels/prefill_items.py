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
    first_token, num_tokens, slot, position = np.asarray(tiles, np.int64).T
    end = position + num_tokens
    low = np.maximum(position - window + 1, 0) // block_n if window else np.zeros_like(end)
    keys = -(-end // block_n) - low
    per_item = max(-(-int(keys.sum()) // most_cuts), -(-least_keys // block_n))
    splits = np.maximum(-(-keys // per_item), 1)
    tile = np.repeat(np.arange(len(keys)), splits)
    split = np.arange(len(tile)) - np.repeat(np.cumsum(splits) - splits, splits)
    begin = low[tile] + split * keys[tile] // splits[tile]
    stop = low[tile] + (split + 1) * keys[tile] // splits[tile]
    places = np.where(splits > 1, splits, 0)
    first_place = (np.cumsum(places) - places)[tile]
    place = first_place + np.where(splits[tile] > 1, split, 0)
    items = np.stack(
        (
            first_token[tile],
            num_tokens[tile],
            slot[tile],
            position[tile],
            begin * block_n,
            np.minimum(stop * block_n, end[tile]),
            place,
            first_place,
            splits[tile],
        ),
        axis=1,
    ).astype(np.int32)
    return items[np.argsort(begin - stop, kind="stable")]
