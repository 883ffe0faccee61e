"""GLM-4.7-Flash: a deepseek_v3 that names its dense layers."""

from __future__ import annotations

from dataclasses import replace

from baton.shared.engine.models import deepseek
from baton.shared.engine.models.mixture_config import read_sigmoid_mixture
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.model_files.fields import Fields, shown

_KINDS = ("dense", "sparse")


def configure(fields: Fields) -> ModelConfig:
    config = deepseek.configure_with_sigmoids(fields)
    mixture = read_sigmoid_mixture(fields, _read_layers(fields, config.num_layers))
    return replace(config, mixture=mixture)


def _read_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """Which have a mixture: `mlp_layer_types`, or all but the first."""
    name = "mlp_layer_types"
    kinds = fields.strings(name)
    if kinds is None:
        kinds = ["dense", *["sparse"] * (num_layers - 1)]
    for kind in kinds:
        if kind not in _KINDS:
            raise fields.error(name, f"{shown(kind)} is not supported")
    if len(kinds) != num_layers:
        raise fields.error(name, f"has {len(kinds)} entries for {num_layers} hidden layers")
    layers = tuple(kind == "sparse" for kind in kinds)
    # What files have beside it, for other engines; transformers does not read it.
    if fields.get("first_k_dense_replace") is not None:
        first = fields.integer("first_k_dense_replace", least=0)
        if layers != tuple(index >= first for index in range(num_layers)):
            raise fields.error("first_k_dense_replace", f"{first} contradicts {name}")
    return layers


GLM4_MOE_LITE = ModelType(
    "glm4_moe_lite", configure, build_decoder, (deepseek.NAMES,), ignores_layers_ahead=True
)
