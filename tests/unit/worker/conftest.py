"""A tiny random llama, and runners over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from tests.weights import weight_shapes

MakeRunner = Callable[[int], ModelRunner]
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


@pytest.fixture(scope="session")
def make_runner(tmp_path_factory: pytest.TempPathFactory) -> MakeRunner:
    """Given the size of its pool in blocks, a runner on one CPU thread, of the class `exact`."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(11)
    weights = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.5
        for name, shape in weight_shapes(directory).items()
    }
    save_file(weights, directory / "model.safetensors")
    return lambda num_blocks: _runner(directory, num_blocks)


def _runner(directory: Path, num_blocks: int) -> ModelRunner:
    runner = ModelRunner(
        EngineConfig(directory, device="cpu", block_size=BLOCK_SIZE, num_blocks=num_blocks)
    )
    assert runner.determinism == "exact"
    return runner
