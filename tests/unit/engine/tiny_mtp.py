"""Tiny random checkpoints that ship a layer that guesses tokens ahead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.unit.engine.tiny_models import SIZES, make_tiny


def make_tiny_mtp(model_dir: Path, model_type: str, fields: dict[str, Any], **how: Any) -> Any:
    """Saves a model whose last layer in transformers, which is given back, is the one that guesses;
    what is before that layer is random and the same in file and `model.mtp`."""
    num_layers: int = {**SIZES, **fields}["num_hidden_layers"]
    model = make_tiny(model_dir, model_type, {**fields, "num_hidden_layers": num_layers + 1}, **how)
    size, prefix = model.config.hidden_size, f"model.layers.{num_layers}."
    generator = torch.Generator().manual_seed(3)

    def around_one() -> torch.Tensor:
        return 0.5 + torch.rand(size, generator=generator)

    own = {
        "enorm": around_one(),
        "hnorm": around_one(),
        "eh_proj": torch.randn(size, 2 * size, generator=generator) * 0.15,
        "shared_head.norm": around_one(),
    }
    path = model_dir / "model.safetensors"
    weights = load_file(path)
    weights |= {f"{prefix}{name}.weight": weight for name, weight in own.items()}
    # As files have them, once more.
    embedding = weights["model.embed_tokens.weight"]
    weights[f"{prefix}embed_tokens.weight"] = embedding.clone()
    weights[f"{prefix}shared_head.head.weight"] = weights.get("lm_head.weight", embedding).clone()
    save_file(weights, path)
    config = json.loads((model_dir / "config.json").read_text())
    config |= {"num_hidden_layers": num_layers, "num_nextn_predict_layers": 1}
    for name in ("mlp_layer_types", "layer_types"):
        if config.get(name):
            config[name] = config[name][:num_layers]
    (model_dir / "config.json").write_text(json.dumps(config))
    model.own = own
    model.num_layers = num_layers
    return model
