"""Random tiny llamas made with transformers, and runners over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from tests.device import ENGINE

MakeLlama = Callable[..., tuple[Path, Any]]
MakeRunner = Callable[..., ModelRunner]

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_llama(tmp_path: Path) -> MakeLlama:
    """Saves a random llama → its directory and the transformers model, float32 and eager.

    `**changes` are fields of its config; `max_shard_size` splits the file; `std` is that of the
    weights. By default logits are far apart, and attention looks at
    few tokens.
    """
    quiet: Any = transformers_logging
    quiet.disable_progress_bar()

    def make(*, max_shard_size: str = "1GB", std: float = 0.35, **changes: Any) -> tuple[Path, Any]:
        torch.manual_seed(7)
        fields = {**TINY, **changes, "attn_implementation": "eager"}
        model: Any = LlamaForCausalLM(LlamaConfig(**fields))
        model.eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(std=std / 0.7)
                else:
                    parameter.normal_(std=std)
        model.generation_config.eos_token_id = None
        model_dir = tmp_path / f"llama-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(model_dir, max_shard_size=max_shard_size)
        return model_dir, model

    return make


@pytest.fixture
def make_runner() -> MakeRunner:
    def make(model_dir: Path, **changes: Any) -> ModelRunner:
        return ModelRunner(EngineConfig(model_dir, **{"num_blocks": 128, **ENGINE, **changes}))

    return make


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Changes fields of a directory's config.json; `None` for a value means null."""

    def edit(model_dir: Path, **changes: Any) -> None:
        path = model_dir / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit
