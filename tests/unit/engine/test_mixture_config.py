"""Mixtures of experts in config.json: what becomes of the fields, and what contradicts itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.kernels.routing import ClampedSwiglu, RoutingRule
from baton.shared.engine.models import registry
from baton.shared.engine.models.mixture_config import MixtureConfig
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.model_files.fields import ModelError

BASE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
FULL, SLIDING = "full_attention", "sliding_attention"
Read = Callable[..., ModelConfig]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(model_type: str, **changes: Any) -> ModelConfig:
        fields: dict[str, Any] = {"model_type": model_type, "num_key_value_heads": 2, **BASE}
        (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}))
        return registry.load_model_config(tmp_path)[1]

    return read


def mixture_of(config: ModelConfig) -> MixtureConfig:
    assert config.mixture is not None
    return config.mixture


@pytest.mark.parametrize(
    ("model_type", "changes", "layers"),
    [
        ("qwen3_moe", {}, "xxxx"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "-x-x"),
        ("qwen3_moe", {"mlp_only_layers": [0, 3]}, "-xx-"),
        ("qwen3_moe", {"mlp_only_layers": [1, 9], "decoder_sparse_step": 2}, "---x"),
        ("qwen2_moe", {"mlp_only_layers": None}, "xxxx"),
        ("mixtral", {}, "xxxx"),
        ("glm4_moe", {}, "-xxx"),
        ("glm4_moe", {"first_k_dense_replace": 0}, "xxxx"),
        ("glm4_moe", {"first_k_dense_replace": 4}, "----"),
        ("gpt_oss", {}, "xxxx"),
    ],
)
def test_which_layers_have_one(
    read: Read, model_type: str, changes: dict[str, Any], layers: str
) -> None:
    assert mixture_of(read(model_type, **changes)).layers == tuple(each == "x" for each in layers)


@pytest.mark.parametrize(
    ("model_type", "changes", "rule"),
    [
        ("qwen3_moe", {}, RoutingRule(num_experts=128, top_k=8)),
        (
            "qwen3_moe",
            {"num_local_experts": 16, "norm_topk_prob": True},
            RoutingRule(num_experts=16, top_k=8, is_normalised=True),
        ),
        ("qwen2_moe", {"num_experts": 6}, RoutingRule(num_experts=6, top_k=4)),
        ("mixtral", {}, RoutingRule(num_experts=8, top_k=2, is_normalised=True)),
        (
            "glm4_moe",
            {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
            RoutingRule(
                num_experts=128,
                top_k=8,
                scoring="sigmoid",
                is_normalised=True,
                floor=1e-20,
                scale=2.5,
                num_groups=8,
                top_groups=4,
            ),
        ),
        ("gpt_oss", {}, RoutingRule(num_experts=128, top_k=4, scoring="softmax_of_chosen")),
    ],
)
def test_how_experts_are_chosen(
    read: Read, model_type: str, changes: dict[str, Any], rule: RoutingRule
) -> None:
    assert mixture_of(read(model_type, **changes)).routing == rule


def test_sizes_and_what_experts_do(read: Read) -> None:
    shared = mixture_of(read("qwen2_moe", shared_expert_intermediate_size=72))
    assert (shared.expert_size, shared.shared_size, shared.has_shared_gate) == (1408, 72, True)
    shared = mixture_of(read("glm4_moe", n_shared_experts=2))
    assert (shared.expert_size, shared.shared_size, shared.has_shared_gate) == (1408, 2816, False)
    assert mixture_of(read("mixtral", intermediate_size=96)).expert_size == 96
    clamped = mixture_of(read("gpt_oss", swiglu_limit=5.0))
    assert clamped.activation == ClampedSwiglu(1.702, 5.0) and not clamped.may_be_mxfp4
    packed = read("gpt_oss", quantization_config={"quant_method": "mxfp4"})
    assert mixture_of(packed).may_be_mxfp4 and not packed.quantization


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("qwen3_moe", {"sliding_window": 64}, [None] * 4),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, [64] * 4),
        ("qwen2_moe", {"sliding_window": 0}, [None] * 4),
        (
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
            [64, None, 64, None],
        ),
        ("mixtral", {"sliding_window": 64}, [64] * 4),
        ("gpt_oss", {}, [128, None] * 2),
        ("gpt_oss", {"layer_types": [FULL] * 3 + [SLIDING]}, [None, None, None, 128]),
    ],
)
def test_windows(
    read: Read, model_type: str, changes: dict[str, Any], windows: list[int | None]
) -> None:
    assert [layer.window for layer in read(model_type, **changes).attentions] == windows


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_moe", {"num_experts": 4}, "num_experts_per_tok: 8 of 4 experts"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts: must be at least 1"),
        ("qwen3_moe", {"num_experts": "8"}, "num_experts: must be an integer"),
        (
            "qwen3_moe",
            {"num_experts": 8, "num_local_experts": 16},
            "num_local_experts: 16 contradicts num_experts 8",
        ),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok: must be at least 1"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: must be at least 1"),
        ("qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers: -1 is no number of a layer"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers: must be a list of integers"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act: only"),
        ("qwen3_moe", {"layer_types": [SLIDING] * 4}, "layer_types: sliding_attention, but use_"),
        ("qwen2_moe", {"num_experts_per_tok": 61}, "num_experts_per_tok: 61 of 60 experts"),
        ("mixtral", {"num_local_experts": 1}, "num_experts_per_tok: 2 of 1 experts"),
        ("glm4_moe", {"n_group": 3}, "n_group: 128 experts are not 3 equal groups"),
        ("glm4_moe", {"n_group": 128}, "n_group: groups of 1; they are chosen by their best two"),
        ("glm4_moe", {"n_group": 4, "topk_group": 5}, "topk_group: 5 of 4 groups"),
        (
            "glm4_moe",
            {"n_group": 32, "topk_group": 1},
            "topk_group: 1 groups of 4 have no 8 experts to choose",
        ),
        ("glm4_moe", {"routed_scaling_factor": 0}, "routed_scaling_factor: must be finite and"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts: must be at least 1"),
        ("gpt_oss", {"swiglu_limit": -7.0}, "swiglu_limit: must be finite and positive"),
        ("gpt_oss", {"num_local_experts": 2}, "num_experts_per_tok: 4 of 2 experts"),
        (
            "qwen3_moe",
            {"quantization_config": {"quant_method": "mxfp4"}},
            "quantization_config.quant_method: must be one of compressed-tensors",
        ),
    ],
)
def test_what_is_refused(
    read: Read, model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        read(model_type, **changes)
    assert f"config.json: {message}" in str(caught.value)
