"""Ministral 3: a mistral whose queries grow with their position. Mistral 3's text part is one, or
a mistral."""

from __future__ import annotations

from baton.shared.engine.models import mistral
from baton.shared.engine.models.llama import NAMES
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.engine.models.multimodal import text_part_of
from baton.shared.engine.models.rope_fields import RopeRules
from baton.shared.model_files.fields import Fields

_ROPE = RopeRules(
    has_query_scale=True,
    default={
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
)


def configure(fields: Fields) -> ModelConfig:
    return mistral.configure(fields, _ROPE)


MINISTRAL3 = ModelType("ministral3", configure, build_decoder, (NAMES,))
MISTRAL3 = text_part_of(
    "mistral3",
    [mistral.MISTRAL, MINISTRAL3],
    ignored_modules=["vision_tower", "multi_modal_projector"],
)
