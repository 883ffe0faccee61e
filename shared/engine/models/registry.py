"""The model types that the engine serves, by the `model_type` of config.json."""

from __future__ import annotations

import logging
from pathlib import Path

from baton.shared.engine.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from baton.shared.engine.models.falcon_h1 import FALCON_H1
from baton.shared.engine.models.gemma2 import GEMMA2
from baton.shared.engine.models.gemma3 import GEMMA3, GEMMA3_TEXT
from baton.shared.engine.models.gemma4 import GEMMA4, GEMMA4_TEXT
from baton.shared.engine.models.glm4 import GLM4
from baton.shared.engine.models.glm4_moe import GLM4_MOE
from baton.shared.engine.models.glm4_moe_lite import GLM4_MOE_LITE
from baton.shared.engine.models.gpt_oss import GPT_OSS
from baton.shared.engine.models.granite import GRANITE
from baton.shared.engine.models.granitemoehybrid import GRANITEMOEHYBRID
from baton.shared.engine.models.llama import LLAMA
from baton.shared.engine.models.mamba2 import MAMBA2
from baton.shared.engine.models.ministral3 import MINISTRAL3, MISTRAL3
from baton.shared.engine.models.mistral import MISTRAL
from baton.shared.engine.models.mixtral import MIXTRAL
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.nemotron_h import NEMOTRON_H
from baton.shared.engine.models.phi3 import PHI3
from baton.shared.engine.models.qwen2 import QWEN2, QWEN2_5_VL
from baton.shared.engine.models.qwen2_moe import QWEN2_MOE
from baton.shared.engine.models.qwen3 import QWEN3, QWEN3_VL
from baton.shared.engine.models.qwen3_5 import (
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_5_MOE_TEXT,
    QWEN3_5_TEXT,
)
from baton.shared.engine.models.qwen3_moe import QWEN3_MOE
from baton.shared.engine.models.qwen3_next import QWEN3_NEXT
from baton.shared.engine.models.rope_fields import check_ropes
from baton.shared.engine.models.smollm3 import SMOLLM3
from baton.shared.model_files.fields import Fields, shown
from baton.shared.model_files.info import open_config
from baton.shared.model_files.type_defaults import text_part
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

_TYPES = {
    each.name: each
    for each in (
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        FALCON_H1,
        GEMMA2,
        GEMMA3,
        GEMMA3_TEXT,
        GEMMA4,
        GEMMA4_TEXT,
        GLM4,
        GLM4_MOE,
        GLM4_MOE_LITE,
        GPT_OSS,
        GRANITE,
        GRANITEMOEHYBRID,
        KIMI_K2,
        LLAMA,
        MAMBA2,
        MINISTRAL3,
        MISTRAL,
        MISTRAL3,
        MIXTRAL,
        NEMOTRON_H,
        PHI3,
        QWEN2,
        QWEN2_5_VL,
        QWEN2_MOE,
        QWEN3,
        QWEN3_5,
        QWEN3_5_MOE,
        QWEN3_5_MOE_TEXT,
        QWEN3_5_TEXT,
        QWEN3_MOE,
        QWEN3_NEXT,
        QWEN3_VL,
        SMOLLM3,
    )
}
_BOOKKEEPING = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    embd_pdrop finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    label2id length_penalty max_length min_length name_or_path num_labels output_attentions
    output_hidden_states output_router_logits pad_token_id prefix pretraining_tp problem_type
    resid_pdrop return_dict router_aux_loss_coef router_jitter_noise sep_token_id
    task_specific_params tokenizer_class torchscript transformers_version unsloth_fixed
    unsloth_version use_cache
    """.split()
)
"""What every file may hold, and what is not worth a line in the log."""
_MOST_LAYERS = 10_000


def model_types() -> list[ModelType]:
    """All of them, by name."""
    return [_TYPES[name] for name in sorted(_TYPES)]


def has(name: str) -> bool:
    """Whether there is a type of that name."""
    return name in _TYPES


def register(model_type: ModelType) -> None:
    """Adds a type, or takes the place of one of that name."""
    _TYPES[model_type.name] = model_type


def load_model_config(model_dir: Path) -> tuple[ModelType, ModelConfig]:
    """Reads a Hugging Face directory's config.json and generation_config.json.

    Fields that the type does not read are named in one log line.

    Raises:
        ModelError: no such directory or file, bad JSON, a wrong type, or a field whose value is not
            computed here.
    """
    fields = open_config(model_dir)
    model_type, config = configure(fields)
    ignored = ignored_fields(fields)
    if ignored:
        log_event(
            logger,
            logging.INFO,
            "fields of the model's config that change nothing here are ignored",
            file=str(fields.path),
            fields=" ".join(ignored),
        )
    return model_type, config


def ignored_fields(fields: Fields) -> list[str]:
    """Of a file that `configure` has read: what it does not know, by name."""
    return sorted(fields.unread(_BOOKKEEPING))


def configure(fields: Fields) -> tuple[ModelType, ModelConfig]:
    """`fields` of config.json, with its type's defaults.

    Raises:
        ModelError: as of `load_model_config`.
    """
    name = fields.string("model_type")
    model_type = _TYPES.get(name)
    if model_type is None:
        known = ", ".join(sorted(_TYPES))
        raise fields.error("model_type", f"{shown(name)} is not supported; supported are {known}")
    text = text_part(fields)
    # A slip of the pen would take all memory before any tensor is missed.
    if text.get("num_hidden_layers") is not None:
        text.integer("num_hidden_layers", most=_MOST_LAYERS)
    config = model_type.configure(fields)
    check_ropes(text, {(layer.rope, layer.head_dim) for layer in config.attentions})
    return model_type, config
