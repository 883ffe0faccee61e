"""Whose code computes a model: the engine's own, or that of the library transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from baton.shared.engine.config import AUTO, EngineConfig
from baton.shared.engine.executor import Executor, Model
from baton.shared.engine.gguf_weights import GgufWeights
from baton.shared.engine.model_digest import find_weight_files
from baton.shared.engine.model_loader import ModelPlan, load_model, plan_model
from baton.shared.engine.models import registry
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.operations import Operations
from baton.shared.engine.quantised.leftovers import leave_out
from baton.shared.engine.quantised.quantise import Method
from baton.shared.engine.weights import DummyWeights, WeightFiles
from baton.shared.kv.cache_spec import CacheGroup
from baton.shared.model_files.fields import ModelError, shown
from baton.shared.model_files.gguf.file import WEIGHTS
from baton.shared.model_files.info import open_config

Weights = WeightFiles | GgufWeights | DummyWeights
MakeExecutor = Callable[[int, int], Executor]
"""Over a cache of its own with so many blocks in each pool, for steps of at most so many rows; the
model is loaded by then."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and as what a model is loaded."""

    ops: Operations
    dtype: torch.dtype
    """Of activations."""
    device: torch.device
    num_positions: int
    """Of the longest sequence that is served."""
    ropes_made_for: int
    """See `rope_tables`."""


class Implementation(Protocol):
    @property
    def name(self) -> str:
        """`baton`, or the other library and its version."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def has_graphs(self) -> bool:
        """Whether a GPU may record its decode steps once and replay them."""

    def check_steps(self, most_tokens: int) -> None:
        """`most_tokens`: of a step. ModelError: it computes no steps of so many."""

    def plan(
        self,
        weights: Weights,
        groups: Sequence[CacheGroup],
        ops: Operations,
        dtype: torch.dtype,
    ) -> ModelPlan:
        """What loading will do. ModelError: the weights are not the model's."""

    def load(
        self,
        weights: Weights,
        groups: Sequence[CacheGroup],
        place: Place,
        on_read: Callable[[], None],
    ) -> Model:
        """`on_read` is called `ModelPlan.num_reads` times. ModelError: a file cannot be read."""

    def check(
        self,
        model: Model,
        make_executor: MakeExecutor,
        groups: Sequence[CacheGroup],
        block_size: int,
    ) -> bool:
        """After loading: whether nothing that was measured speaks against the class `exact`.

        Raises:
            ModelError: it does not compute what it should.
        """


@dataclass(frozen=True, slots=True)
class OwnImplementation:
    """Of shared/engine/models/."""

    model_type: ModelType
    config: ModelConfig
    name: str = "baton"
    quantise: Method | None = None
    """How plain weights are made small."""
    has_graphs: bool = True

    def check_steps(self, most_tokens: int) -> None:
        """Of any length."""

    def plan(
        self,
        weights: Weights,
        groups: Sequence[CacheGroup],
        ops: Operations,
        dtype: torch.dtype,
    ) -> ModelPlan:
        plan = plan_model(self.model_type, self.config, groups, weights, ops, dtype, self.quantise)
        self._check_all_taken(weights, plan)
        return plan

    def _check_all_taken(self, weights: Weights, plan: ModelPlan) -> None:
        left_out: set[str] = set()
        if self.config.quantization is not None and isinstance(weights, WeightFiles):
            left_out = leave_out(weights.names - plan.shapes.keys(), weights)
        num_layers = self.config.num_layers
        weights.check_all_taken(
            plan.shapes,
            lambda name: name in left_out or self.model_type.ignores(name, num_layers),
        )

    def load(
        self,
        weights: Weights,
        groups: Sequence[CacheGroup],
        place: Place,
        on_read: Callable[[], None],
    ) -> Model:
        return load_model(
            self.model_type,
            self.config,
            groups,
            weights,
            place.ops,
            dtype=place.dtype,
            device=place.device,
            num_positions=place.num_positions,
            ropes_made_for=place.ropes_made_for,
            on_read=on_read,
            quantise=self.quantise,
        )

    def check(
        self,
        model: Model,
        make_executor: MakeExecutor,
        groups: Sequence[CacheGroup],
        block_size: int,
    ) -> bool:
        return True


def find_weights(config: EngineConfig, model: ModelConfig) -> Weights:
    """Raises ModelError when there are none."""
    if config.load_format == "dummy":
        return DummyWeights(are_tokens_apart=model.mixture is not None)
    if find_weight_files(config.model_dir)[0].name == WEIGHTS:
        return GgufWeights(config.model_dir)
    return WeightFiles(config.model_dir)


def _own(config: EngineConfig) -> OwnImplementation:
    model_type, model = registry.load_model_config(config.model_dir)
    if config.quantization is None:
        return OwnImplementation(model_type, model)
    path = config.model_dir / "config.json"
    if model.quantization is not None:
        method = model.quantization.method
        raise ModelError(f"quantization: the model is quantised already: {path} says {method}")
    if config.load_format != "dummy" and find_weight_files(config.model_dir)[0].name == WEIGHTS:
        raise ModelError(f"quantization: {config.model_dir / WEIGHTS} is quantised already")
    return OwnImplementation(model_type, model, quantise=config.quantization)


def find_implementation(config: EngineConfig) -> Implementation:
    """Reads config.json; `model_impl` says whose code is taken, auto: the engine's own, and that of
    transformers for types that it has none for.

    Raises:
        ModelError: the model is served by none of those that may be taken.
    """
    fields = open_config(config.model_dir)
    name = fields.string("model_type")
    is_own = registry.has(name)
    if config.model_impl == "baton" or (config.model_impl == "auto" and is_own):
        return _own(config)
    if config.quantization is not None:
        raise ModelError("quantization: transformers' code takes no weights that are quantised")
    if config.kv_cache_dtype != AUTO:
        raise ModelError(
            f"kv_cache_dtype: {config.kv_cache_dtype} was asked for, and transformers' code runs "
            "over keys and values as they are"
        )
    # Loaded only where it is needed: it takes seconds, and memory.
    from baton.shared.engine.transformers_backend.implementation import TransformersImplementation
    from baton.shared.engine.transformers_backend.library import why_not_there

    problem = why_not_there()
    if problem is None:
        return TransformersImplementation.of(config, fields)
    if config.model_impl == "transformers":
        raise ModelError(f"model_impl: {problem}")
    known = ", ".join(each.name for each in registry.model_types())
    raise fields.error(
        "model_type",
        f"{shown(name)} is not supported; supported are {known}; others may run through "
        f"transformers, but {problem}",
    )
