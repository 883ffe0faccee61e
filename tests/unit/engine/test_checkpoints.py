"""config.json of well-known checkpoints: each is read to its known sizes, or refused by name.

The files are in checkpoints/, with where they are quoted (SOURCES.md).
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from baton.shared.engine.models.delta_config import DeltaModelConfig
from baton.shared.engine.models.mamba_config import HybridConfig
from baton.shared.engine.models.model_config import AttentionConfig, ModelConfig
from baton.shared.engine.models.registry import load_model_config
from baton.shared.engine.models.rope import rope_tables
from baton.shared.model_files.fields import ModelError

DIRECTORY = Path(__file__).parent / "checkpoints"

SERVED = {
    "codellama/CodeLlama-34b-hf": "48 x (64 / 8 x 128 default)",
    "deepseek-ai/DeepSeek-R1": "61 x (128 x 128 + 64 of 512 yarn), 8 of 256 experts of 2048",
    "deepseek-ai/DeepSeek-V2-Lite": "27 x (16 x 128 + 64 of 512 yarn), 6 of 64 experts of 1408",
    "google/gemma-2-27b-it": (
        "23 x (32 / 16 x 128 default, 4096), 23 x (32 / 16 x 128 default), tied"
    ),
    "google/gemma-2-2b-it": "13 x (8 / 4 x 256 default, 4096), 13 x (8 / 4 x 256 default), tied",
    "google/gemma-2-9b-it": "21 x (16 / 8 x 256 default, 4096), 21 x (16 / 8 x 256 default), tied",
    "google/gemma-3-12b-it": "40 x (16 / 8 x 256 default, 1024), 8 x (16 / 8 x 256 linear), tied",
    "google/gemma-3-1b-it": "22 x (4 / 1 x 256 default, 512), 4 x (4 / 1 x 256 default), tied",
    "google/gemma-4-26B-A4B": (
        "25 x (16 / 8 x 256 default, 1024), 5 x (16 / 2 x 512 proportional), "
        "8 of 128 experts of 704, tied"
    ),
    "google/gemma-4-31B-it": (
        "50 x (32 / 16 x 256 default, 1024), 10 x (32 / 4 x 512 proportional), tied"
    ),
    "google/gemma-4-E2B-it": (
        "12 x (8 / 1 x 256 default, 512), 3 x (8 / 1 x 512 proportional), "
        "16 x (8 / 1 x 256 default, 512, shared), 4 x (8 / 1 x 512 proportional, shared), tied"
    ),
    "google/gemma-4-E4B-it": (
        "20 x (8 / 2 x 256 default, 512), 4 x (8 / 2 x 512 proportional), "
        "15 x (8 / 2 x 256 default, 512, shared), 3 x (8 / 2 x 512 proportional, shared), tied"
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": "30 x (9 / 3 x 64 default), tied",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "32 x (15 / 5 x 64 default), tied",
    "HuggingFaceTB/SmolLM3-3B": "27 x (16 / 4 x 128 default), 9 x (16 / 4 x 128 none), tied",
    "ibm-granite/granite-3.1-2b-base": "40 x (32 / 8 x 64 default)",
    "meta-llama/Llama-3.2-1B-Instruct": "16 x (32 / 8 x 64 llama3), tied",
    "meta-llama/Llama-3.2-3B-Instruct": "28 x (24 / 8 x 128 llama3), tied",
    "meta-llama/Llama-3.3-70B-Instruct": "80 x (64 / 8 x 128 llama3)",
    "meta-llama/Meta-Llama-3.1-405B": "126 x (128 / 8 x 128 llama3)",
    "meta-llama/Meta-Llama-3.1-70B": "80 x (64 / 8 x 128 llama3)",
    "meta-llama/Meta-Llama-3.1-8B": "32 x (32 / 8 x 128 llama3)",
    "microsoft/phi-4": "40 x (40 / 10 x 128 default)",
    "microsoft/Phi-3.5-mini-instruct": "32 x (32 / 32 x 96 longrope)",
    "microsoft/Phi-4-mini-instruct": "32 x (24 / 8 x 128 longrope), tied",
    "mistralai/Ministral-3-3B-Instruct-2512": "26 x (32 / 8 x 128 yarn), tied",
    "mistralai/Ministral-8B-Instruct-2410": "36 x (32 / 8 x 128 default, 32768)",
    "mistralai/Mistral-7B-Instruct-v0.2": "32 x (32 / 8 x 128 default)",
    "mistralai/Mistral-7B-Instruct-v0.3": "32 x (32 / 8 x 128 default)",
    "mistralai/Mistral-7B-v0.1": "32 x (32 / 8 x 128 default, 4096)",
    "mistralai/Mistral-Nemo-Instruct-2407": "40 x (32 / 8 x 128 default)",
    "mistralai/Mistral-Small-24B-Instruct-2501": "40 x (32 / 8 x 128 default)",
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": "40 x (32 / 8 x 128 default)",
    "mistralai/Mixtral-8x22B-v0.1": "56 x (48 / 8 x 128 default), 2 of 8 experts of 16384",
    "mistralai/Mixtral-8x7B-v0.1": "32 x (32 / 8 x 128 default), 2 of 8 experts of 14336",
    "Qwen/Qwen1.5-MoE-A2.7B": "24 x (16 / 16 x 128 default), 4 of 60 experts of 1408",
    "openai/gpt-oss-120b": (
        "18 x (64 / 8 x 64 yarn, 128), 18 x (64 / 8 x 64 yarn), 4 of 128 experts of 2880"
    ),
    "openai/gpt-oss-20b": (
        "12 x (64 / 8 x 64 yarn, 128), 12 x (64 / 8 x 64 yarn), 4 of 32 experts of 2880"
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (
        "36 x (32 of 16 key heads, 128 to 128, delta rule), 12 x (16 / 2 x 256 default), "
        "10 of 512 experts of 512"
    ),
    "Qwen/Qwen3.5-35B-A3B": (
        "30 x (32 of 16 key heads, 128 to 128, delta rule), 10 x (16 / 2 x 256 default), "
        "8 of 256 experts of 512"
    ),
    "Qwen/Qwen3.5-27B": (
        "48 x (48 of 16 key heads, 128 to 128, delta rule), 16 x (24 / 4 x 256 default)"
    ),
    "Qwen/Qwen3-235B-A22B": "94 x (64 / 4 x 128 default), 8 of 128 experts of 1536",
    "zai-org/GLM-4.5-Air": "46 x (96 / 8 x 128 default), 8 of 128 experts of 1408",
    "Qwen/Qwen3-30B-A3B": "48 x (32 / 4 x 128 default), 8 of 128 experts of 768",
    "Qwen/Qwen2-0.5B-Instruct": "24 x (14 / 2 x 64 default), tied",
    "Qwen/Qwen2-7B-Instruct": "28 x (28 / 4 x 128 default)",
    "Qwen/Qwen2.5-14B": "48 x (40 / 8 x 128 default)",
    "Qwen/Qwen2.5-32B": "64 x (40 / 8 x 128 default)",
    "Qwen/Qwen2.5-3B": "36 x (16 / 2 x 128 default), tied",
    "Qwen/Qwen2.5-7B": "28 x (28 / 4 x 128 default)",
    "Qwen/Qwen2.5-VL-7B-Instruct": "28 x (28 / 4 x 128 default)",
    "Qwen/Qwen3-0.6B": "28 x (16 / 8 x 128 default), tied",
    "Qwen/Qwen3-1.7B": "28 x (16 / 8 x 128 default), tied",
    "Qwen/Qwen3-14B": "40 x (40 / 8 x 128 default)",
    "Qwen/Qwen3-32B": "64 x (64 / 8 x 128 default)",
    "Qwen/Qwen3-4B": "36 x (32 / 8 x 128 default), tied",
    "Qwen/Qwen3-8B": "36 x (32 / 8 x 128 default)",
    "Qwen/Qwen3-VL-4B-Instruct": "36 x (32 / 8 x 128 default), tied",
    "Qwen/Qwen3-VL-8B-Instruct": "36 x (32 / 8 x 128 default)",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "22 x (32 / 4 x 64 default)",
    "zai-org/GLM-4-9B-0414": "40 x (32 / 2 x 128 default)",
    "mistralai/Devstral-2-123B-Instruct-2512": "88 x (96 / 8 x 128 yarn)",
    "mistralai/Devstral-Small-2-24B-Instruct-2512": "40 x (32 / 8 x 128 yarn)",
    "moonshotai/Kimi-K2-Instruct": "61 x (64 x 128 + 64 of 512 yarn), 8 of 384 experts of 2048",
    "nvidia/Gemma-4-31B-IT-NVFP4": (
        "50 x (32 / 16 x 256 default, 1024), 10 x (32 / 4 x 512 proportional), tied"
    ),
    "Qwen/Qwen3-32B-FP8": "64 x (64 / 8 x 128 default)",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (
        "23 x (64 x 64 of 128, 8 groups, mamba2), 6 x (32 / 2 x 128 none), 6 of 128 experts of 1856"
    ),
    "state-spaces/mamba2-780m": "48 x (48 x 64 of 128, 1 groups, mamba2), tied",
    "tiiuae/Falcon-H1-0.5B-Base": (
        "36 x (24 x 64 of 128, 1 groups, mamba2), 36 x (8 / 2 x 64 default)"
    ),
}
"""Layers x (query heads / key and value heads x head size, rope, window, whose cache), experts. Of
latents: heads x (what is made of the latent + what turns, of a key) of the latent's size."""

UNKNOWN_TO_TRANSFORMERS = ("moonshotai/Kimi-K2-Instruct",)

# Latent or linear attention, other norms.
REFUSED = {
    "allenai/OLMo-2-1124-7B": 'model_type: "olmo2" is not supported',
    "bigcode/starcoder2-3b": 'model_type: "starcoder2" is not supported',
    "google/gemma-2b": 'model_type: "gemma" is not supported',
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": 'model_type: "llama4" is not supported',
    "microsoft/Phi-3.5-vision-instruct": 'model_type: "phi3_v" is not supported',
    "Qwen/Qwen3-VL-30B-A3B-Instruct": 'model_type: "qwen3_vl_moe" is not supported',
    "XiaomiMiMo/MiMo-7B-Base": 'model_type: "mimo" is not supported',
}


def described(config: ModelConfig) -> str:
    def kind(layer: AttentionConfig) -> str:
        heads = f"{layer.num_heads} / {layer.num_kv_heads} x {layer.head_dim}"
        if layer.latent is not None:
            sizes = f"{layer.latent.key_dim} + {layer.head_dim} of {layer.latent.rank}"
            heads = f"{layer.num_heads} x {sizes}"
        window = "" if layer.window is None else f", {layer.window}"
        shared = "" if layer.source is None else ", shared"
        return f"({heads} {layer.rope.rope_type}{window}{shared})"

    layers = [f"{count} x {each}" for each, count in Counter(map(kind, config.attentions)).items()]
    if isinstance(config, DeltaModelConfig):
        own, count = config.delta, config.num_layers - len(config.attentions)
        heads = f"{own.num_value_heads} of {own.num_key_heads} key heads"
        sizes = f"{own.key_dim} to {own.value_dim}"
        layers.insert(0, f"{count} x ({heads}, {sizes}, delta rule)")
    if isinstance(config, HybridConfig):
        mamba, count = config.mamba, sum(state is not None for state in config.states)
        heads = f"{mamba.num_heads} x {mamba.head_dim} of {mamba.state_size}"
        layers.insert(0, f"{count} x ({heads}, {mamba.num_groups} groups, mamba2)")
    if config.mixture is not None:
        rule, size = config.mixture.routing, config.mixture.expert_size
        layers.append(f"{rule.top_k} of {rule.num_experts} experts of {size}")
    return ", ".join([*layers, *(["tied"] if config.tie_word_embeddings else [])])


@pytest.fixture
def model_dir(name: str, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(config_of(name))
    return tmp_path


def config_of(name: str) -> str:
    return (DIRECTORY / f"{name.replace('/', '--')}.json").read_text()


def test_each_has_a_source_and_an_expectation() -> None:
    files = {path.stem.replace("--", "/") for path in DIRECTORY.glob("*.json")}
    rows = (DIRECTORY / "SOURCES.md").read_text().splitlines()
    assert files == {row.split("|")[1].strip() for row in rows if row.count("|") == 3} - {
        "checkpoint",
        "---",
    }
    assert files == set(SERVED) | set(REFUSED)


@pytest.mark.parametrize("name", SERVED)
def test_a_checkpoint_is_read_to_its_sizes(name: str, model_dir: Path) -> None:
    model_type, config = load_model_config(model_dir)
    assert model_type.name == json.loads(config_of(name))["model_type"]
    assert described(config) == SERVED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_is_refused_by_name(name: str, model_dir: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_model_config(model_dir)
    message = str(caught.value)
    assert message.startswith(f"{model_dir / 'config.json'}: ") and "\n" not in message
    assert REFUSED[name] in message


@pytest.mark.parametrize("name", [name for name in SERVED if name not in UNKNOWN_TO_TRANSFORMERS])
def test_it_is_what_transformers_reads(name: str, model_dir: Path) -> None:
    """Sizes, windows by layer, and how fast each pair of a head turns."""
    _, ours = load_model_config(model_dir)
    whole = AutoConfig.from_pretrained(model_dir)
    theirs = whole.get_text_config()
    for field in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps"):
        # Where every layer has experts, not all have the third.
        assert getattr(ours, field) == getattr(theirs, field, getattr(ours, field)), field
    longest = getattr(theirs, "max_position_embeddings", ours.max_position_embeddings)
    assert ours.max_position_embeddings == longest
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.tie_word_embeddings == whole.tie_word_embeddings
    layer_types = getattr(theirs, "layer_types", None) or ["full_attention"] * ours.num_layers
    if theirs.model_type in ("mistral", "mixtral") and theirs.sliding_window is not None:
        layer_types = ["sliding_attention"] * ours.num_layers
    others = ("linear_attention", "mlp", "moe")
    assert [each in others for each in layer_types] == [layer is None for layer in ours.layers]
    layer_types = [each for each in layer_types if each not in others]
    for layer, layer_type in zip(ours.attentions, layer_types, strict=True):
        window = theirs.sliding_window if layer_type == "sliding_attention" else None
        # What is never left is none.
        assert layer.window == (window if (window or 0) < ours.max_position_embeddings else None)
    if any(layer.rope.rope_type != "none" for layer in ours.attentions):
        check_ropes(ours, theirs, layer_types)


def check_ropes(ours: ModelConfig, theirs: Any, layer_types: list[str]) -> None:
    """Cosines and sines at some positions, of each kind of layer that turns at all."""
    rotary = rotary_of(theirs)
    positions = torch.arange(64)
    hidden = torch.zeros(1, len(positions), 1)
    by_kind = "full_attention" in theirs.rope_parameters
    for layer, layer_type in dict(zip(ours.attentions, layer_types, strict=True)).items():
        if layer.rope.rope_type == "none":
            continue
        cos, sin, _ = rope_tables(layer.rope, layer.head_dim, len(positions), len(positions))
        theirs_of_text = rotary(hidden, positions[None], *([layer_type] if by_kind else []))
        if isinstance(theirs_of_text, torch.Tensor):
            # Complex numbers, one for each pair.
            theirs_of_text = [
                torch.cat((part, part), -1) for part in (theirs_of_text.real, theirs_of_text.imag)
            ]
        for table, of_text in zip((cos, sin), theirs_of_text, strict=True):
            # Pairs that turn come first here; where text has three positions, they are one.
            # One number for each pair, of gpt_oss; else one for each of a pair.
            size = of_text.shape[-1]
            num_pairs = size if theirs.model_type == "gpt_oss" else size // 2
            first = of_text.reshape(-1, len(positions), size)[0, :, :num_pairs]
            torch.testing.assert_close(table[:, :num_pairs], first)
        assert bool((cos[:, num_pairs:] == 1).all() and (sin[:, num_pairs:] == 0).all())


def rotary_of(config: Any) -> Any:
    """The module that makes a language model's cosines and sines."""
    place = type(config).__module__.replace(".configuration_", ".modeling_")
    names = {
        name: each
        for name, each in vars(importlib.import_module(place)).items()
        if name.endswith("RotaryEmbedding") and "Vision" not in name
    }
    [rotary] = names.values()
    return rotary(config)
