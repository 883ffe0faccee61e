"""Models of every rope type against transformers: the same logits, the same greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.models import decoder, llama, qwen3, registry
from baton.shared.engine.models.model_config import (
    ModelConfig,
)
from baton.shared.engine.models.model_type import ModelType
from baton.shared.model_files.fields import Fields, ModelError
from tests.unit.engine.conftest import MakeLlama, MakeRunner
from tests.unit.engine.test_logits_vs_transformers import check_logits, check_tokens

ORIGINAL = 280
"""Tokens of the longest sequence; longer than any here, shorter than the model's longest."""
FACTORS = {
    "short_factor": [1 + place / 9 for place in range(8)],
    "long_factor": [3.0 + place * 2 for place in range(8)],
}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, **FACTORS}
TYPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "yarn-scaled": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 2.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
        "rope_theta": 500.0,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "longrope": LONGROPE,
}


@pytest.mark.parametrize("rope", TYPES)
def test_a_llama(rope: str, make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    """longrope has its short factors: the worker takes no longer sequences."""
    model_dir, model = make_llama(rope_parameters=dict(TYPES[rope]))
    check_logits(model, make_runner(model_dir, max_model_len=ORIGINAL), min_span=10)


def make_long(model: Any) -> None:
    """transformers with the long factors for every sequence."""
    rotary = model.model.rotary_emb
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, seq_len=ORIGINAL + 1)
    assert not bool((long == rotary.original_inv_freq).any())
    rotary.original_inv_freq.copy_(long)


@pytest.mark.exact
def test_a_llama_with_long_factors(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    """As soon as a sequence might be longer, for all of them."""
    model_dir, model = make_llama(rope_parameters=dict(LONGROPE))
    make_long(model)
    runner = make_runner(model_dir, max_model_len=ORIGINAL + 1)
    check_logits(model, runner, min_span=10)
    check_tokens(model, runner)
    short = make_runner(model_dir, max_model_len=ORIGINAL)
    # Of these the capability is made.
    assert runner.numerics.endswith(" longrope long")
    assert short.numerics == runner.numerics.removesuffix("long") + "short"


def test_dynamic_is_served_within_its_length_only(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama(rope_parameters=dict(TYPES["dynamic"]))
    reason = "max_model_len: 513 exceeds max_position_embeddings 512"
    with pytest.raises(ModelError, match=reason):
        make_runner(model_dir, max_model_len=513)


def test_a_checkpoint_of_neighbours_is_the_same_model(
    make_llama: MakeLlama,
    make_runner: MakeRunner,
    edit_config: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pairs moved in the file, with all that belongs to a row of queries or keys: biases, scales,
    norms of heads. Loading moves them back, to the same bits."""

    def configure(fields: Fields) -> ModelConfig:
        config = llama.configure(fields)
        is_interleaved = fields.boolean("is_interleaved")
        layers = [
            replace(layer, rope=replace(layer.rope, is_interleaved=is_interleaved))
            for layer in config.attentions
        ]
        style = replace(config.style, has_qk_norm=True)
        return replace(config, layers=tuple(layers), style=style)

    monkeypatch.setattr(registry, "_TYPES", dict(registry._TYPES))
    registry.register(ModelType("test_neighbours", configure, decoder.build, (qwen3.NAMES,)))
    model_dir, _ = make_llama(attention_bias=True)
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(3)
    for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        for name in "qk":
            tensors[f"{layer}.{name}_norm.weight"] = torch.rand(16, generator=generator) + 0.5
        weight = tensors[f"{layer}.q_proj.weight"]
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[f"{layer}.q_proj.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{layer}.q_proj.weight_scale"] = scale
    save_file(tensors, path)
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}}
    edit_config(
        model_dir,
        model_type="test_neighbours",
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": groups,
        },
    )
    batch = Batch([BatchRow(list(range(40)), 0, [[0, 1, 2]])])
    expected = make_runner(model_dir).logits(batch)

    moved = [half for pair in range(8) for half in (pair, pair + 8)]
    for name, tensor in tensors.items():
        if ".q_" in name or ".k_" in name:
            heads = tensor.view(-1, 16, *tensor.shape[1:])
            tensors[name] = heads[:, moved].reshape(tensor.shape)
    save_file(tensors, path)
    assert not torch.equal(make_runner(model_dir).logits(batch), expected)
    edit_config(model_dir, is_interleaved=True)
    assert torch.equal(make_runner(model_dir).logits(batch), expected)
