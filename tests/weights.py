"""What a model directory's weights are called, for tests that write random ones."""

from __future__ import annotations

from pathlib import Path

import torch

from baton.shared.engine.model_loader import plan_model
from baton.shared.engine.models.mtp import find_layer
from baton.shared.engine.models.registry import load_model_config
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.engine.weights import DummyWeights
from baton.shared.kv.cache_spec import cache_groups


def weight_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """By name, in the order in which the model takes them; config.json is enough."""
    model_type, config = load_model_config(model_dir)
    groups = cache_groups(config.cache_specs)
    source, ops = DummyWeights(), ReferenceOperations()
    plan = plan_model(model_type, config, groups, source, ops, torch.float32)
    return plan.shapes


def shapes_ahead(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Likewise of the layer that guesses tokens ahead."""
    layer = find_layer(model_dir)
    groups = cache_groups(layer.config.cache_specs)
    return layer.plan(DummyWeights(), groups, ReferenceOperations(), torch.float32).shapes
