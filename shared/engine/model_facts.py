"""What a model directory is, and what serving it takes, of its files' headers alone: no torch.

What is refused here is refused by a worker in the same words; a worker compares the tensors with
config.json, too, before it reads them (refusal.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.shared.engine.model_digest import find_weight_files
from baton.shared.engine.models import registry
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.quantised.scheme import Quantization
from baton.shared.engine.weight_headers import ITEMSIZES, read_header
from baton.shared.kv.cache_spec import CacheGroup, cache_groups, window_of
from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.gguf.file import WEIGHTS, GgufFile
from baton.shared.model_files.info import open_config
from baton.shared.model_files.type_defaults import TEXT_TYPES

_BLOCK_SIZE = 16
_NO_NUMBERS = re.compile(r"scale|zero|g_idx|weight_shape|inv_freq")
"""In names of tensors that say how others are read."""
_PACKED = re.compile(r"(\.qweight|\.weight_packed|_blocks)$")


@dataclass(frozen=True, slots=True)
class WeightFacts:
    num_numbers: int
    """Of all tensors that are read, quantised ones counted as they are meant."""
    stored_bytes: int
    forms: tuple[str, ...]
    """How they are stored: BF16, Q4_1, …; of quantised ones also as config.json says it."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    model_type: ModelType
    config: ModelConfig
    weights: WeightFacts
    groups: tuple[CacheGroup, ...]
    ignored_fields: list[str]

    @property
    def is_text_part(self) -> bool:
        return self.model_type.name in TEXT_TYPES

    @property
    def is_quantised(self) -> bool:
        return self.config.quantization is not None or any(
            each.startswith("GGUF") for each in self.weights.forms
        )

    def cache_bytes(self, num_tokens: int, itemsize_bytes: int) -> int:
        """What a sequence of so many tokens keeps."""
        return sum(_bytes_of(group, num_tokens, itemsize_bytes) for group in self.groups)

    @property
    def layer_kinds(self) -> list[tuple[str, int]]:
        """What each kind of layer keeps, and how many there are."""
        return [(type(group.spec).__name__.lower(), len(group.layer_ids)) for group in self.groups]


def read_model_facts(model_dir: Path) -> ModelFacts:
    """Of a type that has a file of its own.

    Raises:
        ModelError: a file is missing or broken, or config.json says what is not computed.
    """
    fields = open_config(model_dir)
    model_type, config = registry.configure(fields)
    return ModelFacts(
        model_type,
        config,
        _read_weights(model_dir, model_type, config),
        cache_groups(config.cache_specs),
        registry.ignored_fields(fields),
    )


def _read_weights(model_dir: Path, model_type: ModelType, config: ModelConfig) -> WeightFacts:
    listing, shards = find_weight_files(model_dir)
    if listing.name == WEIGHTS:
        file = GgufFile(listing)
        names = file.tensor_names
        kinds = {file.kind(name) for name in names}
        count = sum(math.prod(file.shape(name)) for name in names)
        return WeightFacts(count, listing.stat().st_size, (f"GGUF {', '.join(sorted(kinds))}",))
    paths = {model_dir / name for name in shards.values()} or {listing}
    _check_embedding(listing, model_type, {name for name, _, _ in _tensors(paths, shards)})
    count, stored, dtypes = 0, 0, set[str]()
    for name, dtype, num_elements in _tensors(paths, shards):
        if model_type.ignores(name, config.num_layers):
            continue
        stored += num_elements * ITEMSIZES[dtype]
        if not _NO_NUMBERS.search(name):
            count += num_elements * _per_element(name, dtype, config.quantization)
            dtypes.add(dtype)
    quantised = (config.quantization.method,) if config.quantization is not None else ()
    return WeightFacts(count, stored, (*quantised, *sorted(dtypes)))


def _check_embedding(listing: Path, model_type: ModelType, names: set[str]) -> None:
    """The files are another model's, or of another type, where there is neither it nor a head."""
    ends = [f"{form[end]}.weight" for form in model_type.names for end in ("embedding", "head")]
    if names.isdisjoint(ends):
        raise ModelError(f"{listing}: {ends[0]}: missing tensor")


def _tensors(paths: set[Path], shards: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    """Name, dtype and elements of each; of a sharded model as the index assigns them."""
    for path in sorted(paths):
        for name, header in read_header(path).items():
            if not shards or shards.get(name) == path.name:
                yield name, header.dtype, math.prod(header.shape)


def _per_element(name: str, dtype: str, quantization: Quantization | None) -> int:
    """Numbers in an element: words and bytes hold several."""
    if not _PACKED.search(name):
        return 1
    module = _PACKED.sub("", name)
    scheme = quantization and quantization.scheme(module)
    return ITEMSIZES[dtype] * 8 // (scheme.num_bits if scheme else 4)


def _bytes_of(group: CacheGroup, num_tokens: int, itemsize_bytes: int) -> int:
    kept = min(num_tokens, window_of(group.spec) or num_tokens)
    num_blocks = group.num_blocks_for(kept, _BLOCK_SIZE)
    return num_blocks * group.block_bytes(_BLOCK_SIZE, itemsize_bytes)
