"""Measures, on this machine and with this thread count, what the class `exact` rests on.

A matrix library picks its inner loop by shape, so the bits of a row may depend on how many rows
there are. From some number of rows on they usually do not; here that number is looked for, and the
class is claimed only when it is found. Takes some milliseconds for a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from baton.kernels.reference import TILE
from baton.kernels.reference_latent import of_each_head
from baton.shared.engine.linear import Linear
from baton.shared.engine.models.delta_config import DeltaModelConfig
from baton.shared.engine.models.model_config import AttentionConfig, ModelConfig
from baton.shared.engine.operations import Operations

MIN_LINEAR_ROWS = 16
"""Token rows of a step are padded to at least this many."""
_ATTENTION_ROWS = (4, 8, 16, 32)
_MANY = 67
_MAX_WEIGHT_ELEMENTS = 2**20


def min_attention_rows(config: ModelConfig) -> int | None:
    """The fewest rows from which on a row of attention's products keeps its bits; None: unknown."""
    dims = {_dims_of_heads(layer) for layer in config.attentions}
    fewest = [_min_rows_of_heads(*each) for each in sorted(dims)]
    known = [rows for rows in fewest if rows is not None]
    return max(known, default=1) if len(known) == len(fewest) else None


def _dims_of_heads(layer: AttentionConfig) -> tuple[int, int]:
    """Of keys and values, as the reference has them."""
    if layer.latent is None:
        return layer.head_dim, layer.head_dim
    return layer.latent.rank + layer.head_dim, layer.latent.rank


def _min_rows_of_heads(head_dim: int, value_dim: int) -> int | None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, _MANY, head_dim, generator=generator)
    keys = torch.randn(5, TILE, head_dim, generator=generator)
    weights = torch.rand(5, _MANY, TILE, generator=generator)

    def scores(rows: int, batch: int) -> Tensor:
        a = query[:batch, :rows].contiguous()
        return torch.bmm(a, keys[:batch].transpose(1, 2))

    def sums(rows: int, batch: int) -> Tensor:
        return torch.bmm(weights[:batch, :rows].contiguous(), keys[:batch, :, :value_dim])

    for rows in _ATTENTION_ROWS:
        if _is_stable(scores, rows) and _is_stable(sums, rows):
            return rows
    return None


def latents_are_stable(config: ModelConfig) -> bool:
    """Whether what each head makes of latents keeps its bits, from MIN_LINEAR_ROWS rows on."""
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for layer in config.attentions:
        if (latent := layer.latent) is not None:
            shapes.add((layer.num_heads, latent.key_dim, latent.rank))
            shapes.add((layer.num_heads, latent.rank, latent.value_dim))
    for num_heads, num_in, num_out in sorted(shapes):
        weight = torch.randn(min(num_heads, 5), num_in, num_out, generator=generator)
        x = torch.randn(_MANY, len(weight), num_in, generator=generator)

        def product(rows: int, _: int, x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return of_each_head(x[:rows], weight).flatten(1)[None]

        if not _is_stable(product, MIN_LINEAR_ROWS):
            return False
    return True


def linear_is_stable(shapes: Collection[tuple[int, int]], ops: Operations) -> bool:
    """Whether rows of linear layers keep their bits from MIN_LINEAR_ROWS rows on.

    Args:
        shapes: [out, in] of the layers.
    """
    generator = torch.Generator().manual_seed(0)
    for num_out, num_in in sorted(shapes):
        # The order of a row's sum depends on the inputs' number; outputs are cut to save time.
        num_out = min(num_out, max(64, _MAX_WEIGHT_ELEMENTS // num_in))
        layer = ops.pack_linear(torch.randn(num_out, num_in, generator=generator))
        x = torch.randn(_MANY, num_in, generator=generator)

        def product(rows: int, _: int, x: Tensor = x, layer: Linear = layer) -> Tensor:
            return ops.linear(x[:rows].contiguous(), layer)[None]

        if not _is_stable(product, MIN_LINEAR_ROWS):
            return False
    return True


def elementwise_is_stable() -> bool:
    """Whether exp, log1p and rsqrt give an element the same bits wherever it stands: softplus,
    sigmoid and norms are made of these."""
    values = torch.randn(1031, generator=torch.Generator().manual_seed(0)) * 5
    spans = [(start, start + n) for start in (0, 1, 7) for n in (1, 5, 16, 31, 100, 1000)]
    for function, inputs in (
        (torch.exp, values),
        (torch.log1p, values.abs()),
        (torch.rsqrt, values.abs()),
    ):
        whole = function(inputs)
        if not all(torch.equal(function(inputs[a:b].clone()), whole[a:b]) for a, b in spans):
            return False
    return True


def deltas_are_stable(config: ModelConfig) -> bool:
    """Whether a delta rule's sums over keys give a row the same bits beside others as alone: where
    heads are few, torch may share value columns out over threads."""
    if not isinstance(config, DeltaModelConfig):
        return True
    own = config.delta
    num_heads = own.num_value_heads
    # With more heads than threads it shares out heads.
    most = 2 + torch.get_num_threads() // num_heads
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(most, num_heads, own.key_dim, own.value_dim, generator=generator)
    alone = torch.stack([row.sum(-2) for row in x])
    return all(torch.equal(x[:rows].sum(-2), alone[:rows]) for rows in range(1, most + 1))


def _is_stable(product: Callable[[int, int], Tensor], min_rows: int) -> bool:
    """Compares products of other sizes with the largest, row by row."""
    whole = product(_MANY, 5)
    sizes = {min_rows, min_rows + 1, min_rows + 3, 2 * min_rows, 2 * min_rows - 1, 33, 64}
    for rows in sorted(size for size in sizes if min_rows <= size <= _MANY):
        for batch in (2, 3, 5):
            part = product(rows, batch)
            if not torch.equal(part, whole[: len(part), :rows]):
                return False
    return True
