"""Random tiny models of every type, made with transformers: what test_model_types.py runs over.

A type adds its rows to TINY_MODELS, and is run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from tests.unit.engine.tiny_deltas import TINY_DELTAS
from tests.unit.engine.tiny_foreign import TINY_FOREIGN
from tests.unit.engine.tiny_gemmas import TINY_GEMMAS
from tests.unit.engine.tiny_latents import ALIASES, TINY_LATENTS
from tests.unit.engine.tiny_llamas import TINY_LLAMAS
from tests.unit.engine.tiny_mambas import TINY_MAMBAS
from tests.unit.engine.tiny_mixtures import TINY_MIXTURES
from tests.unit.engine.tiny_qwens import TINY_QWENS

Fields = dict[str, Any]
_CAUSAL_LM: Any = AutoModelForCausalLM
_MULTIMODAL: Any = AutoModelForImageTextToText

SIZES: Fields = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
WINDOW = 21
"""Of the windowed ones; some prompts end around it."""
VISION: dict[str, Fields] = {
    "gemma3": {"num_attention_heads": 2, "image_size": 64, "patch_size": 16},
    "gemma4": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
    "mistral3": {"model_type": "pixtral", "num_attention_heads": 2, "head_dim": 8},
    "qwen2_5_vl": {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
    "qwen3_5": {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16},
    "qwen3_5_moe": {
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    },
    "qwen3_vl": {
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}
"""Multimodal types, and what makes their vision small; the fields of others are the text's."""

_LOUD = re.compile(r"\.([qk]_norm|post_\w+norm(_[12])?)\.weight$")
"""Norms that make up for small weights: of heads, and of what a layer adds."""

TINY_MODELS: dict[str, dict[str, Fields]] = {
    **TINY_LLAMAS,
    **TINY_QWENS,
    **TINY_GEMMAS,
    **TINY_MIXTURES,
    **TINY_LATENTS,
    **TINY_DELTAS,
    **TINY_MAMBAS,
}
"""Of types that are served by their own file."""
ALL_TINY = {**TINY_MODELS, **TINY_FOREIGN}
CASES = [(model_type, case) for model_type, cases in ALL_TINY.items() for case in cases]


def make_tiny(
    model_dir: Path,
    model_type: str,
    fields: Fields,
    *,
    std: float = 0.35,
    seed: int = 7,
    is_calm: bool = False,
) -> Any:
    """Saves a random model → the same in transformers, float32 and eager.

    Logits are far apart, and attention looks at few tokens. In one that is calm no rounding grows:
    attention looks at many, and layers add little to what a token is.
    """
    std, token_std = (0.05, 1.0) if is_calm else (std, std)
    quiet: Any = transformers_logging
    quiet.disable_progress_bar()
    torch.manual_seed(seed)
    model = _new_model(model_type, fields)
    # Embeddings are scaled by the root of their size, and a head that they are tied to is not.
    has_small_head = model_type.startswith("gemma") and model.config.tie_word_embeddings
    adds_one = model_type in ("gemma", "gemma2") or model_type.startswith("gemma3")
    adds_one |= model_type in TINY_DELTAS
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_calm and _LOUD.search(name):
                parameter.uniform_(0.1, 0.3).sub_(1.0 if adds_one else 0.0)
            elif name.endswith(("router.scale", "per_expert_scale")):
                parameter.uniform_(0.5, 1.5)
            elif has_small_head and name.endswith("model.norm.weight"):
                parameter.uniform_(6, 8)
            elif "norm" in name:
                is_plain = not adds_one or "linear_attn.norm" in name
                parameter.uniform_(0.5, 1.5).sub_(0.0 if is_plain else 1.0)
            elif has_small_head and "embed_tokens" in name:
                parameter.normal_(std=token_std / parameter.shape[1] ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=std / 0.7)
            elif "embed" in name:
                parameter.normal_(std=token_std)
            elif "lm_head" in name:
                parameter.normal_(std=std)
            else:
                parameter.normal_(std=std * 0.7)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.7, 1.3)
            elif name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(model_dir)
    rename_alias(model_dir, model_type)
    return model.eval()


def rename_alias(model_dir: Path, model_type: str) -> None:
    """In the config.json of a type whose name transformers does not know."""
    if model_type in ALIASES:
        path = model_dir / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": model_type}))


def _new_model(model_type: str, fields: Fields) -> Any:
    if model_type not in VISION:
        known_as = ALIASES.get(model_type, model_type)
        config = AutoConfig.for_model(known_as, **{**SIZES, **fields})
        return _CAUSAL_LM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
    fields = dict(fields)
    outer = {name: fields.pop(name) for name in ("tie_word_embeddings",) if name in fields}
    # An image is made padding before it is looked at.
    text = {**SIZES, "pad_token_id": 0, **fields.pop("text_config", fields)}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= VISION[model_type]
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **outer)
    return _MULTIMODAL.from_config(config, attn_implementation="eager")
