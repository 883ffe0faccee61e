"""config.json of models with mixers of Mamba2: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.shared.engine import device_choices
from baton.shared.engine.config import DeviceError
from baton.shared.engine.models.mamba_config import HybridConfig
from baton.shared.engine.models.registry import load_model_config
from baton.shared.kv.cache_spec import Full, State
from baton.shared.model_files.fields import ModelError

_SIZES = {"vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
FIELDS: dict[str, dict[str, Any]] = {
    "mamba2": {**_SIZES, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 16, "n_groups": 2},
    "nemotron_h": {**_SIZES, "hybrid_override_pattern": "M-*E", "mamba_num_heads": 8},
    "granitemoehybrid": {
        **_SIZES,
        "num_hidden_layers": 2,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
    },
    "falcon_h1": {**_SIZES, "num_hidden_layers": 2, "mamba_d_ssm": 96, "mamba_n_heads": 6},
}


def read(directory: Path, model_type: str, changes: dict[str, Any]) -> HybridConfig:
    values = {"model_type": model_type, **FIELDS[model_type], **changes}
    (directory / "config.json").write_text(json.dumps(values))
    config = load_model_config(directory)[1]
    assert isinstance(config, HybridConfig)
    return config


@pytest.mark.parametrize(
    ("model_type", "changes", "refusal"),
    [
        # A pattern and a number of layers that contradict each other, both named.
        ("nemotron_h", {"num_hidden_layers": 5}, "pattern: has 4 .* num_hidden_layers 5"),
        (
            "nemotron_h",
            {
                "hybrid_override_pattern": None,
                "layers_block_type": ["mamba"],
                "num_hidden_layers": 2,
            },
            "layers_block_type: has 1 .* num_hidden_layers 2",
        ),
        ("nemotron_h", {"layers_block_type": ["mamba"]}, "pattern: contradicts layers_block_type"),
        ("granitemoehybrid", {"num_hidden_layers": 3}, "layer_types: has 2 .* num_hidden_layers 3"),
        (
            "nemotron_h",
            {"hybrid_override_pattern": "M?"},
            r'pattern: "\?" is not one of M, \*, -, E',
        ),
        ("nemotron_h", {"hybrid_override_pattern": ""}, "pattern: names no layer"),
        ("nemotron_h", {"hybrid_override_pattern": "--E"}, "pattern: no layer knows of other"),
        ("granitemoehybrid", {"layer_types": ["mamba", "mlp"]}, 'layer_types: "mlp" is not one of'),
        ("granitemoehybrid", {"layer_types": "mamba"}, "layer_types: must be a list of strings"),
        # Heads that are not what the sizes say.
        ("mamba2", {"head_dim": 24}, "head_dim: 24 times num_heads 8 is not expand .* 128"),
        ("mamba2", {"n_groups": 3}, "n_groups: 3 does not divide num_heads 8"),
        ("granitemoehybrid", {"mamba_d_head": 12}, "mamba_d_head: 12 times mamba_n_heads 8"),
        ("granitemoehybrid", {"mamba_n_heads": 7}, "mamba_n_heads: 7 does not divide"),
        ("falcon_h1", {"mamba_d_head": 12}, "12 times mamba_n_heads 6 is not mamba_d_ssm, 96"),
        ("falcon_h1", {"mamba_n_groups": 4}, "mamba_n_groups: 4 does not divide mamba_n_heads 6"),
        ("nemotron_h", {"mamba_num_heads": 4}, "n_groups: 8 does not divide mamba_num_heads 4"),
        # What is not computed.
        ("mamba2", {"conv_kernel": 1}, "conv_kernel: must be at least 2"),
        ("mamba2", {"hidden_act": "relu"}, "hidden_act: must be one of silu"),
        ("mamba2", {"time_step_limit": [0.1]}, "time_step_limit: must be two numbers"),
        ("mamba2", {"time_step_limit": [2.0, 1.0]}, "time_step_limit: must be a range"),
        ("falcon_h1", {"time_step_limit": "auto"}, "time_step_limit: must be two numbers"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, 'mlp_hidden_act: only "relu2"'),
        ("nemotron_h", {"mamba_ssm_cache_dtype": "int8"}, "mamba_ssm_cache_dtype: must be one of"),
        ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings: only false"),
        ("nemotron_h", {"n_groups": 2, "mamba_n_groups": 4}, "n_groups: only 4 .* mamba_n_groups"),
        ("nemotron_h", {"num_experts_per_tok": 9}, "num_experts_per_tok: 9 of 8 experts"),
        ("granitemoehybrid", {"num_experts_per_tok": 9}, "num_experts_per_tok: 9 of 8 experts"),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers: has 1 numbers, not 5"),
        (
            "falcon_h1",
            {"mlp_bias": True, "mlp_multipliers": [0.5, 1.0]},
            "mlp_multipliers: .* 0.5 .* mlp_bias",
        ),
    ],
)
def test_refused_by_name(
    model_type: str, changes: dict[str, Any], refusal: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=refusal):
        read(tmp_path, model_type, changes)


def test_what_layers_cache(tmp_path: Path) -> None:
    """A slot for the layers with a mixer, blocks for those that attend, nothing for the others."""
    mamba2 = read(tmp_path, "mamba2", {})
    assert [type(spec) for spec in mamba2.cache_specs] == [type(None)] * 3 + [State] * 3
    assert (mamba2.num_heads, mamba2.head_dim, mamba2.max_position_embeddings) == (0, 0, 2**20)
    nemotron = read(tmp_path, "nemotron_h", {"mamba_ssm_cache_dtype": "bfloat16"})
    kinds = [
        State if spec in nemotron.states else type(spec) for spec in nemotron.cache_specs if spec
    ]
    assert kinds == [Full, State]
    assert nemotron.mamba.state_spec.tensors[0].dtype == "bfloat16"
    assert nemotron.mixture is not None and nemotron.mixture.layers == (False, False, False, True)
    falcon = read(tmp_path, "falcon_h1", {})
    assert [type(spec) for spec in falcon.cache_specs] == [Full] * 2 + [State] * 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, (0.0, float("inf"))),
        ([0.0, float("inf")], (0.0, float("inf"))),
        ([0.5, {"__float__": "Infinity"}], (0.5, float("inf"))),
        ([0, "Infinity"], (0.0, float("inf"))),
        ([0, 2], (0.0, 2.0)),
    ],
)
def test_limits_of_steps(given: Any, expected: tuple[float, float], tmp_path: Path) -> None:
    mamba = read(tmp_path, "mamba2", {"time_step_limit": given}).mamba
    assert (mamba.dt_min, mamba.dt_max) == expected


def test_patterns_are_spelled_in_several_ways(tmp_path: Path) -> None:
    """Those of older files, and of both, when they say the same."""
    found = set()
    for changes in (
        {"hybrid_override_pattern": "M*E-"},
        {
            "hybrid_override_pattern": "M*E-",
            "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        },
        {
            "hybrid_override_pattern": None,
            "layer_types": ["linear_attention", "full_attention", "moe", "mlp"],
            "num_hidden_layers": 4,
        },
    ):
        config = read(tmp_path, "nemotron_h", changes)
        found.add((config.layers, config.states))
    assert len(found) == 1


def test_groups_that_no_kernel_normalises_are_refused_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_choices, "why_no_triton", lambda _: None)
    device = torch.device("cuda")
    wide = {"hidden_size": 16384, "num_heads": 512, "head_dim": 64}
    config = read(tmp_path, "mamba2", {**wide, "n_groups": 2})
    assert device_choices.choose_kernels("triton", device, config) == "triton"
    config = read(tmp_path, "mamba2", {**wide, "n_groups": 1})
    with pytest.raises(DeviceError, match="32768 numbers are normalised together, .* take 16384"):
        device_choices.choose_kernels("triton", device, config)
