"""Tiny random models of one cache group and of two, and runners over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from tests import recurrent
from tests.weights import shapes_ahead, weight_shapes

MakeRunner = Callable[..., ModelRunner]
BLOCK_SIZE = 4

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "hidden_act": "silu",
}


WINDOWED = {**CONFIG, "model_type": "mistral", "sliding_window": 6}
LAYERS = ["sliding_attention", "full_attention"]
ALTERNATING = {
    **WINDOWED,
    "model_type": "gemma2",
    "layer_types": LAYERS,
    "query_pre_attn_scalar": 8,
}
# Blocks of unequal bytes: each group has a pool of its own.
UNEQUAL = {
    **WINDOWED,
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "layer_types": LAYERS * 2,
    "num_kv_shared_layers": 2,
    "head_dim": 12,
    "num_key_value_heads": 1,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 61,
}
STATES = {
    **CONFIG,
    "model_type": recurrent.TYPE.name,
    "state_num_heads": 3,
    "state_head_dim": 5,
}
LATENTS = {
    **CONFIG,
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# A layer that guesses is as the only one, and so are its weights (`_guess_well`).
AHEAD = {
    **LATENTS,
    "model_type": "deepseek_v3",
    "num_hidden_layers": 1,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
}
AHEAD_WITH_STATES = {
    **CONFIG,
    "model_type": "qwen3_5_text",
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": False,
    "mtp_num_hidden_layers": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "full": CONFIG,
    "windowed": WINDOWED,
    "one pool": ALTERNATING,
    "two pools": UNEQUAL,
    "latents": LATENTS,
    "layer ahead": AHEAD,
    "layer ahead, states": AHEAD_WITH_STATES,
    "states": {**STATES, "layer_types": ["recurrent", "full_attention"]},
    "states alone": {**STATES, "layer_types": ["recurrent", "recurrent"]},
    "states alone, long": {
        **STATES,
        "layer_types": ["recurrent", "recurrent"],
        "max_position_embeddings": 1 << 15,
    },
}


@pytest.fixture(scope="session")
def make_runner(tmp_path_factory: pytest.TempPathFactory) -> MakeRunner:
    return runners(tmp_path_factory.mktemp)


def runners(new_directory: Callable[[str], Path]) -> MakeRunner:
    """Given the size of its pool in blocks, and one of CONFIGS, a runner on one CPU thread, of the
    class `exact`; further arguments are those of EngineConfig."""
    torch.set_num_threads(1)
    directories: dict[str, Path] = {}

    @recurrent.known()
    def make(num_blocks: int, kind: str = "full", **how: Any) -> ModelRunner:
        if kind not in directories:
            directories[kind] = new_directory("tiny")
            _write_model(directories[kind], CONFIGS[kind])
        runner = ModelRunner(
            EngineConfig(
                directories[kind],
                device="cpu",
                block_size=BLOCK_SIZE,
                num_blocks=num_blocks,
                **how,
            )
        )
        assert runner.determinism == "exact"
        return runner

    return make


def _write_model(directory: Path, config: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(11)
    has_layer_ahead = bool({"num_nextn_predict_layers", "mtp_num_hidden_layers"} & config.keys())
    shapes = weight_shapes(directory) | (shapes_ahead(directory) if has_layer_ahead else {})
    weights = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.5
        for name, shape in shapes.items()
    }
    if has_layer_ahead:
        _guess_well(weights)
    save_file(weights, directory / "model.safetensors")


def _guess_well(weights: dict[str, torch.Tensor]) -> None:
    """The layer ahead is nearly the last one: of embeddings as long as each other the norm takes
    nothing, and what came of the token before is left out. It never sees the prompt's first token,
    so neither attends to much, nor does a layer before the last one add much."""
    generator = torch.Generator().manual_seed(12)
    embedding = weights["model.embed_tokens.weight"]
    embedding /= embedding.pow(2).mean(-1, keepdim=True).sqrt()
    projection = torch.eye(embedding.shape[1], 2 * embedding.shape[1])
    if "mtp.fc.weight" in weights:
        last, ahead = "model.layers.1.", "mtp.layers.0."
        # Norms multiply by one more than they say.
        for name in [each for each in weights if "norm" in each and "linear_attn" not in each]:
            weights[name] -= 1.0
        for name in ("q_norm", "k_norm"):
            weights[f"{last}self_attn.{name}.weight"] -= 0.5
        weights["mtp.fc.weight"] = projection
        weights["model.layers.0.linear_attn.out_proj.weight"] *= 0.02
        weights["model.layers.0.mlp.down_proj.weight"] *= 0.001
    else:
        last, ahead = "model.layers.0.", "model.layers.1."
        weights["model.layers.1.eh_proj.weight"] = projection
    weights[f"{last}self_attn.o_proj.weight"] *= 0.5
    for name in [each for each in weights if each.startswith(last)]:
        weight = weights[name]
        noise = torch.randn(weight.shape, generator=generator)
        weights[name.replace(last, ahead)] = weight + 0.02 * noise
