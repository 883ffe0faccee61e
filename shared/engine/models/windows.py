"""Which layers attend within a window: what config.json says of it, and what contradicts it.

A window that nothing ever leaves is none: the layers then share the others' cache.
"""

from __future__ import annotations

from baton.shared.engine.models.model_config import read_layer_types
from baton.shared.model_files.fields import Fields


def refuse_windows(fields: Fields, num_layers: int, max_position_embeddings: int) -> None:
    """Of types whose masks know none; but transformers' cache, if nothing tells it that all layers
    are full, keeps only a window's positions."""
    layer_types = read_layer_types(fields, num_layers)
    name = fields.get("model_type")
    if layer_types is not None:
        if set(layer_types) != {"full_attention"}:
            raise fields.error("layer_types", f"a {name} has no layers but full_attention")
        return
    for window in ("sliding_window", "attention_chunk_size"):
        if fields.get(window) is not None and fields.integer(window) < max_position_embeddings:
            raise fields.error(window, f"a {name} has none, not {fields.get(window)}")


def read_window(fields: Fields, num_layers: int, max_position_embeddings: int) -> int | None:
    """`sliding_window`, which all layers have."""
    window = _window(fields)
    layer_types = set(read_layer_types(fields, num_layers) or ())
    if len(layer_types) > 1:
        name = fields.get("model_type")
        raise fields.error("layer_types", f"a {name}'s layers are all of one type")
    if layer_types == {"sliding_attention"} and window is None:
        raise fields.error("layer_types", "sliding_attention, but sliding_window is null")
    return _left(window, max_position_embeddings)


def read_window_if_used(
    fields: Fields, num_layers: int, max_position_embeddings: int
) -> int | None:
    """`sliding_window`, which all layers have if `use_sliding_window`, and no layer else."""
    if fields.boolean("use_sliding_window"):
        return read_window(fields, num_layers, max_position_embeddings)
    fields.get("sliding_window")
    if "sliding_attention" in (read_layer_types(fields, num_layers) or ()):
        raise fields.error("layer_types", "sliding_attention, but use_sliding_window is false")
    return None


def read_upper_windows(
    fields: Fields, num_layers: int, max_position_embeddings: int
) -> list[int | None]:
    """By layer: `layer_types` says which have a window, or all from `max_window_layers` on have
    one, if `use_sliding_window`."""
    first = fields.integer("max_window_layers", default=num_layers, least=0)
    is_sliding = [index >= first for index in range(num_layers)]
    return read_windows(fields, is_sliding, max_position_embeddings)


def read_windows(
    fields: Fields, is_sliding: list[bool], max_position_embeddings: int
) -> list[int | None]:
    """By layer: `layer_types` says which have a window, or, if `use_sliding_window`, `is_sliding`
    does."""
    window = None
    if fields.boolean("use_sliding_window"):
        window = _window(fields)
    else:
        fields.get("sliding_window")
    layer_types = read_layer_types(fields, len(is_sliding))
    if layer_types is not None:
        is_sliding = [each == "sliding_attention" for each in layer_types]
        if window is None and any(is_sliding):
            raise fields.error(
                "layer_types",
                "sliding_attention, but use_sliding_window is false or sliding_window is null",
            )
    window = _left(window, max_position_embeddings)
    return [window if each else None for each in is_sliding]


def every_nth_full(n: int, num_layers: int) -> list[str]:
    """The types of layers where one in `n` has no window."""
    return [
        "sliding_attention" if number % n else "full_attention"
        for number in range(1, num_layers + 1)
    ]


def read_window_of(
    fields: Fields, layer_types: list[str], max_position_embeddings: int
) -> int | None:
    """`sliding_window`, which those layers have that are of that type."""
    if "sliding_attention" not in layer_types:
        return None
    return _left(fields.integer("sliding_window"), max_position_embeddings)


def _window(fields: Fields) -> int | None:
    return None if fields.get("sliding_window") is None else fields.integer("sliding_window")


def _left(window: int | None, max_position_embeddings: int) -> int | None:
    return window if window is None or window < max_position_embeddings else None
