"""Tiny random checkpoints that ship a layer that guesses tokens ahead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.unit.engine.tiny_deltas import FULL, LINEAR, TINY_DELTAS
from tests.unit.engine.tiny_models import SIZES, make_tiny

_BEHIND = {
    "embedding": "{layer}enorm",
    "hidden": "{layer}hnorm",
    "projection": "{layer}eh_proj",
    "norm": "{layer}shared_head.norm",
}
_BESIDE = {
    "embedding": "mtp.pre_fc_norm_embedding",
    "hidden": "mtp.pre_fc_norm_hidden",
    "projection": "mtp.fc",
    "norm": "mtp.norm",
}


def make_tiny_mtp(model_dir: Path, model_type: str, fields: dict[str, Any], **how: Any) -> Any:
    """Saves a model whose last layer in transformers, which is given back, is the one that guesses;
    what is before that layer is random and the same in file and `model.own`. Of types with a delta
    rule it stands beside the model in the file, else behind its last layer."""
    is_beside = model_type in TINY_DELTAS
    num_layers: int = {**SIZES, **fields}["num_hidden_layers"]
    fields = {**fields, "num_hidden_layers": num_layers + 1}
    if is_beside:
        types = fields.get("layer_types") or [LINEAR, LINEAR, LINEAR, FULL]
        fields["layer_types"] = [*types, FULL]
    model = make_tiny(model_dir, model_type, fields, **how)
    inner = model.get_decoder()
    size = inner.config.hidden_size
    generator = torch.Generator().manual_seed(3)

    def around_one() -> torch.Tensor:
        return 0.5 + torch.rand(size, generator=generator)

    own = {
        "embedding": around_one(),
        "hidden": around_one(),
        "projection": torch.randn(size, 2 * size, generator=generator) * 0.15,
        "norm": around_one(),
    }
    path = model_dir / "model.safetensors"
    weights = load_file(path)
    [embedding_name] = [name for name in weights if name.endswith("embed_tokens.weight")]
    prefix = f"{embedding_name.removesuffix('embed_tokens.weight')}layers.{num_layers}."
    for name, place in (_BESIDE if is_beside else _BEHIND).items():
        # Norms of such types multiply by one more than what is stored.
        less = 1.0 if is_beside and name != "projection" else 0.0
        weights[f"{place.format(layer=prefix)}.weight"] = own[name] - less
    if is_beside:
        for name in [each for each in weights if each.startswith(prefix)]:
            weights[f"mtp.layers.0.{name.removeprefix(prefix)}"] = weights.pop(name)
    else:
        # As files have them, once more.
        head = weights.get("lm_head.weight", weights[embedding_name])
        weights[f"{prefix}embed_tokens.weight"] = weights[embedding_name].clone()
        weights[f"{prefix}shared_head.head.weight"] = head.clone()
    save_file(weights, path)
    config = json.loads((model_dir / "config.json").read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"] = num_layers
    # A qwen3_next does not say how many.
    if model_type != "qwen3_next":
        text["mtp_num_hidden_layers" if is_beside else "num_nextn_predict_layers"] = 1
    for name in ("mlp_layer_types", "layer_types"):
        if text.get(name):
            text[name] = text[name][:num_layers]
    (model_dir / "config.json").write_text(json.dumps(config))
    model.own = own
    model.num_layers = num_layers
    return model
