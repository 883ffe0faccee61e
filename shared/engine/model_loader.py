"""Gives a model what it is made of: from a checkpoint to the device, or on paper.

A model type's constructor names each part once. Run with a loader on the device `meta` it reads
nothing, and finds what is missing, what has another shape, and how many bytes the layers will take
(`plan_model`); run with one on a real device, it loads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from baton.kernels.reference_latent import LatentHeads
from baton.shared.engine.executor import Model
from baton.shared.engine.experts import Experts, ExpertsSpec
from baton.shared.engine.latent import LatentHeadsSpec, expand_latent_heads
from baton.shared.engine.linear import Linear, LinearSpec, Part
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.rope import rope_tables
from baton.shared.engine.models.rope_config import RopeConfig
from baton.shared.engine.operations import Norm, Operations
from baton.shared.engine.quantised import gguf
from baton.shared.engine.quantised.quantise import Method
from baton.shared.engine.quantised.scheme import Quantization
from baton.shared.engine.weight_headers import FLOATS, Header
from baton.shared.engine.weights import WeightSource
from baton.shared.kv.cache_spec import CacheGroup, places_of_layers
from baton.shared.model_files.fields import ModelError
from baton.shared.telemetry import log_event

if TYPE_CHECKING:
    from baton.shared.engine.models.blocks import Names

logger = logging.getLogger(__name__)

_META = torch.device("meta")
_CPU = torch.device("cpu")


class ModelLoader:
    """
    Attributes:
        dtype: of activations, and of weights that are not computed in a form of their own.
        places: by layer that caches, its cache group and its place among the layers of a block of
            that group.
        taken: shape of each tensor that was read.
        linear_shapes: [out, in] of each layer as it is computed here.
        num_bytes: of all that was loaded.
        has_small: whether some layers are computed as they are stored.
        has_small_inputs: whether activations are made small in front of some.
        has_small_experts: whether some experts are computed as they are stored.
    """

    def __init__(
        self,
        ops: Operations,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_positions: int,
        ropes_made_for: int,
        quantization: Quantization | None,
        quantise: Method | None = None,
        groups: Sequence[CacheGroup] = (),
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        """`num_positions`: length of rope tables; `ropes_made_for`: see `rope_tables`; `quantise`:
        how plain weights of linear layers are made small."""
        self.ops = ops
        self.dtype = dtype
        self.places = places_of_layers(groups)
        self.quantization = quantization
        self.quantise = quantise
        self.taken: dict[str, tuple[int, ...]] = {}
        self.linear_shapes: set[tuple[int, int]] = set()
        self.num_bytes = 0
        self.has_small = self.has_small_inputs = self.has_small_experts = False
        self._source = source
        self._device = device
        self._num_positions = num_positions
        self._ropes_made_for = ropes_made_for
        self._on_read = on_read
        self._knows = True
        """What is read to be known is, on paper too."""

    @property
    def quantises_inputs(self) -> bool:
        return self.ops.quantises_inputs

    def embedding(self, module: str, num_rows: int, size: int) -> Tensor:
        """[num_rows, size]"""
        return self._counted(self.read_float(f"{module}.weight", (num_rows, size)))

    def norm(
        self,
        module: str,
        size: int,
        eps: float,
        *,
        is_wide: bool = False,
        plus_one: bool = False,
    ) -> Norm:
        """`is_wide`: the weight is kept in float32. `plus_one`: so is 1 + weight, in its place."""
        dtype = torch.float32 if is_wide or plus_one else self.dtype
        weight = self.read_float(f"{module}.weight", (size,), dtype=dtype)
        if plus_one and not weight.is_meta:
            weight += 1
        return Norm(self._counted(weight), eps)

    def numbers(self, name: str, *shape: int, is_wide: bool = False) -> Tensor:
        """A tensor that belongs to no module; `is_wide`: in float32."""
        dtype = torch.float32 if is_wide else self.dtype
        return self._counted(self.read_float(name, shape, dtype=dtype))

    def linear(self, spec: LinearSpec) -> Linear:
        if self.quantise is not None and not spec.is_wide and not spec.stays_plain:
            spec = replace(spec, quantise=self.quantise)
        layer = self.ops.load_linear(spec, self)
        self.has_small |= layer.is_small
        self.has_small_inputs |= layer.inputs is not None
        self.num_bytes += layer.num_bytes
        self.linear_shapes.add((layer.num_out, layer.num_in))
        return layer

    def experts(self, spec: ExpertsSpec) -> Experts:
        # Nothing depends on it where they are expanded, and of a mixture these are thousands.
        self._knows = self.ops.keeps_experts
        layer = self.ops.load_experts(spec, self)
        self._knows = True
        self.has_small_experts |= layer.is_small
        self.num_bytes += layer.num_bytes
        size = self.ops.ranks.share(spec.size, 1)
        num_own = size.stop - size.start
        num_up = spec.num_up // spec.size * num_own
        self.linear_shapes |= {(num_up, spec.num_in), (spec.num_in, num_own)}
        return layer

    def latent_heads(self, spec: LatentHeadsSpec) -> LatentHeads:
        heads = expand_latent_heads(spec, self, self.ops.ranks)
        for weight in heads:
            self._counted(weight)
        return heads

    def tied_head(
        self, module: str, embedded: str, embedding: Tensor, scale: float = 1.0
    ) -> Linear:
        """A head of the weights of the embedding, which is the module `embedded`.

        A checkpoint that says so and yet has another weight there is taken at its weight, as
        transformers does.
        """
        name = f"{module}.weight"
        weight = embedding
        if self.header(name) is not None:
            own = self.read_float(name, tuple(embedding.shape))
            if not own.is_meta and not torch.equal(own, embedding):
                log_event(
                    logger,
                    logging.WARNING,
                    "tied embeddings are not: the file has a head of its own, which is used",
                    tensor=name,
                )
                weight = own
        if weight is embedding and self._keeps_small(f"{embedded}.weight"):
            num_out, num_in = embedding.shape
            return self.linear(LinearSpec(num_in, (Part(embedded, num_out),), scale=scale))
        head = self.ops.pack_linear(weight, scale=scale)
        self.linear_shapes.add((head.num_out, head.num_in))
        return head

    def _keeps_small(self, name: str) -> bool:
        header = self.header(name)
        return self.ops.keeps_small and header is not None and header.dtype in gguf.KINDS

    def rope(self, config: RopeConfig, head_dim: int) -> Any:
        """A table for `Operations.take_rope`."""
        if self._device == _META:
            # Nothing is computed on paper, and to try loads torch's compiler: 75 MB that stay.
            return None
        cos, sin, scale = rope_tables(config, head_dim, self._num_positions, self._ropes_made_for)
        return self.ops.pack_rope(
            cos.to(self._device),
            sin.to(self._device),
            self.dtype,
            None if scale is None else scale.to(self._device),
        )

    def form(self, forms: Sequence[Names]) -> Names:
        """Of the ways to call a model's modules, the checkpoint's; the first where it has none. The
        norm tells only of files without an embedding: ways that differ there may share it."""
        for each in ("embedding", "norm"):
            for names in forms:
                if self.header(f"{names[each]}.weight") is not None:
                    return names
        return forms[0]

    # For whoever makes linear layers

    def header(self, name: str) -> Header | None:
        return self._source.header(name)

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = ()) -> Tensor:
        return self._read(name, shape, None, part)

    def read_known(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._read(name, shape, None, (), is_known=self._knows)

    def read_float(
        self,
        name: str,
        shape: tuple[int, ...],
        part: tuple[slice, ...] = (),
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """In the activations' dtype, if no other is asked for."""
        header = self.header(name)
        if header is not None and header.dtype in gguf.KINDS and len(shape) == 2:
            rows, columns = (*part, slice(None), slice(None))[:2]
            numbers = gguf.read(name, (shape[0], shape[1]), self)
            return numbers.part(rows, columns).expand(dtype or self.dtype)
        if header is not None and header.dtype not in FLOATS:
            raise self.error(name, f"dtype {header.dtype} is not one of {', '.join(FLOATS)}")
        return self._read(name, shape, dtype or self.dtype, part)

    def error(self, name: str, reason: str) -> ModelError:
        return ModelError(f"{self._source.where(name)}: {name}: {reason}")

    def _read(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype | None,
        part: tuple[slice, ...],
        *,
        is_known: bool = False,
    ) -> Tensor:
        device = _CPU if is_known and self._device == _META else self._device
        tensor = self._source.read(name, shape, device, dtype, part)
        self.taken[name] = shape
        self._on_read()
        return tensor

    def _counted(self, tensor: Tensor) -> Tensor:
        self.num_bytes += tensor.nbytes
        return tensor


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What loading a model will do."""

    shapes: dict[str, tuple[int, ...]]
    """Of the tensors that it reads."""
    linear_shapes: frozenset[tuple[int, int]]
    """[out, in] of each linear layer as it is computed here."""
    num_bytes: int
    """Of the layers, as they will be on the device."""
    num_reads: int
    keeps_small: bool = False
    """Some layers are computed as they are stored."""
    quantises_inputs: bool = False
    """Activations are made small in front of some."""
    keeps_experts_small: bool = False
    """Some experts are computed as they are stored."""


def plan_model(
    model_type: ModelType,
    config: ModelConfig,
    groups: Sequence[CacheGroup],
    source: WeightSource,
    ops: Operations,
    dtype: torch.dtype,
    quantise: Method | None = None,
) -> ModelPlan:
    """Builds the model on paper.

    Raises:
        ModelError: the source lacks or misshapes a tensor, or has it in a form that is not served.
    """
    num_reads = 0

    def count() -> None:
        nonlocal num_reads
        num_reads += 1

    load = ModelLoader(
        ops,
        source,
        dtype=dtype,
        device=_META,
        num_positions=1,
        ropes_made_for=1,
        quantization=config.quantization,
        quantise=quantise,
        groups=groups,
        on_read=count,
    )
    model_type.build(config, load, load.form(model_type.names))
    shapes = frozenset(load.linear_shapes)
    return ModelPlan(
        load.taken,
        shapes,
        load.num_bytes,
        num_reads,
        load.has_small,
        load.has_small_inputs,
        load.has_small_experts,
    )


def load_model(
    model_type: ModelType,
    config: ModelConfig,
    groups: Sequence[CacheGroup],
    source: WeightSource,
    ops: Operations,
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_positions: int,
    ropes_made_for: int,
    on_read: Callable[[], None],
    quantise: Method | None = None,
) -> Model:
    """Builds the model on its device; `on_read` is called `ModelPlan.num_reads` times.

    Raises:
        ModelError: a file cannot be read.
    """
    load = ModelLoader(
        ops,
        source,
        dtype=dtype,
        device=device,
        num_positions=num_positions,
        ropes_made_for=ropes_made_for,
        quantization=config.quantization,
        quantise=quantise,
        groups=groups,
        on_read=on_read,
    )
    return model_type.build(config, load, load.form(model_type.names))
