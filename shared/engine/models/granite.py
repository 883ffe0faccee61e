"""Granite: a llama that scales embeddings, attention, what layers add, and logits."""

from __future__ import annotations

from dataclasses import replace

from baton.shared.engine.models import llama
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType, build_decoder
from baton.shared.model_files.fields import Fields


def configure(fields: Fields) -> ModelConfig:
    config = llama.configure(fields)
    scale = fields.number("attention_multiplier")
    return replace(
        config,
        layers=tuple(replace(layer, scale=scale) for layer in config.attentions),
        style=replace(config.style, residual_scale=fields.number("residual_multiplier")),
        embedding_scale=fields.number("embedding_multiplier"),
        logits_scale=1 / fields.number("logits_scaling"),
    )


GRANITE = ModelType("granite", configure, build_decoder, (llama.NAMES,))
