"""Phi-3 and Phi-4-mini: a mistral with fused projections, of whose heads a part may turn."""

from __future__ import annotations

from baton.shared.engine.models import llama, mistral
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.rope_fields import RopeRules
from baton.shared.model_files.fields import Fields

NAMES = {
    **llama.NAMES,
    **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
}
# Its first files called longrope by other names.
_ROPE = RopeRules(
    partial_rotary_factor=1.0,
    original_max_position=4096,
    types=("default", "longrope"),
    renamed={"su": "longrope", "yarn": "longrope"},
)


def configure(fields: Fields) -> ModelConfig:
    config = mistral.configure(fields, _ROPE)
    # Of longrope alone; the file has it in any case.
    fields.get("original_max_position_embeddings")
    return config


PHI3 = ModelType("phi3", configure, build_decoder, (NAMES,))
