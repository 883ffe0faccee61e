"""GLM-4.5: norms before attention and MLP alone, half of each head turns; behind some dense layers
mixtures whose experts are chosen by sigmoids and a bias, from groups, beside one that every token
has."""

from __future__ import annotations

from dataclasses import replace

from baton.shared.engine.models import llama, qwen3, qwen3_moe
from baton.shared.engine.models.mixture_config import read_first_dense, read_sigmoid_mixture
from baton.shared.engine.models.model_config import LayerStyle, ModelConfig
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_fields import RopeRules
from baton.shared.model_files.fields import Fields

NAMES = {
    **qwen3.NAMES,
    **qwen3_moe.EXPERT_NAMES,
    "choice_bias": "mlp.gate.e_score_correction_bias",
    **{f"shared_mlp_{name}": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")},
}
_ROPE = RopeRules(partial_rotary_factor=0.5)


def configure(fields: Fields) -> ModelConfig:
    style = LayerStyle(
        qkv_bias=fields.boolean("attention_bias"), has_qk_norm=fields.boolean("use_qk_norm")
    )
    config = llama.configure(fields, _ROPE, style)
    mixture = read_sigmoid_mixture(fields, read_first_dense(fields, config.num_layers))
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        fields.get(name)
    return replace(config, mixture=mixture)


GLM4_MOE = ModelType("glm4_moe", configure, build_decoder, (NAMES,), ignores_layers_ahead=True)
