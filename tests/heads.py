"""EAGLE-3 heads made up for a small model: right at times, since their logits are fitted to its."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_runner import ModelRunner
from tests.weights import weight_shapes

_NUM_FITTED = 1500
_RIDGE = 1e-2


def make_target(directory: Path, config: dict[str, Any]) -> Path:
    """A model whose next token depends on the last one most of all, so that it can be guessed."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**config, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(11)
    weights = {}
    for name, shape in weight_shapes(directory).items():
        scale = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.5
        weights[name] = torch.randn(shape, generator=draw) * scale
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
    save_file(weights, directory / "model.safetensors")
    return directory


def make_head(
    directory: Path,
    target: dict[str, Any],
    *,
    draft_vocab_size: int | None = None,
    published: bool = False,
    has_embedding: bool = True,
    **fields: Any,
) -> Path:
    """With random weights, for a model of that config.json.

    `published`: laid out as published heads are; `has_embedding`: of its own, where its hidden size
    is another; `fields`: of the head's config.json, or of its layer's where there is such a one.
    """
    vocab_size, size = target["vocab_size"], target["hidden_size"]
    num_own = draft_vocab_size or vocab_size
    layer = {**target, "model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False}
    layer |= {name: value for name, value in fields.items() if name in layer}
    outer = {
        "draft_vocab_size": num_own,
        **{name: value for name, value in fields.items() if name not in layer},
    }
    if published:
        config = {**layer, "architectures": ["LlamaForCausalLMEagle3"], **outer}
    else:
        config = {"speculators_model_type": "eagle3", "transformer_layer_config": layer, **outer}
    config.setdefault("eagle_aux_hidden_state_layer_ids", [0, 1, 2])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(3)
    num_q, num_kv, dim = (
        layer[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )

    def weight(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=draw) * (scale / math.sqrt(shape[-1]))

    hidden = layer["hidden_size"]
    key = weight(num_kv * dim, 2 * hidden, scale=4.0)
    # Queries are keys, so that a token sees itself before all others.
    query = key.view(num_kv, dim, -1).repeat_interleave(num_q // num_kv, 0).flatten(0, 1)
    prefix = "midlayer." if published else "layers.0."
    weights = {
        "fc.weight": weight(
            hidden, len(config["eagle_aux_hidden_state_layer_ids"]) * size, scale=0.3
        ),
        f"{prefix}self_attn.q_proj.weight": query.contiguous(),
        f"{prefix}self_attn.k_proj.weight": key,
        # Of the token more than of what came before it.
        f"{prefix}self_attn.v_proj.weight": torch.cat(
            (weight(num_kv * dim, hidden), weight(num_kv * dim, hidden, scale=0.2)), 1
        ),
        f"{prefix}self_attn.o_proj.weight": weight(hidden, num_q * dim, scale=3.0),
        f"{prefix}mlp.gate_proj.weight": weight(layer["intermediate_size"], hidden),
        f"{prefix}mlp.up_proj.weight": weight(layer["intermediate_size"], hidden),
        f"{prefix}mlp.down_proj.weight": weight(hidden, layer["intermediate_size"], scale=0.3),
        "lm_head.weight": weight(num_own, hidden),
    }
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        weights[f"{prefix}{name}.weight"] = torch.ones(hidden)
    weights["norm.weight"] = torch.ones(hidden)
    if hidden != size and has_embedding:
        weights["embed_tokens.weight"] = torch.randn(vocab_size, hidden, generator=draw)
    if num_own != vocab_size:
        own = torch.tensor(
            sorted(random.Random(4).sample(range(vocab_size), min(num_own, vocab_size)))
        )
        weights["d2t"] = own - torch.arange(len(own))
        weights["t2d"] = torch.zeros(vocab_size, dtype=torch.bool)
        weights["t2d"][own] = True
    save_file(weights, directory / "model.safetensors")
    return directory


def fit_head(directory: Path, runner: ModelRunner) -> None:
    """Sets the head's logits to what comes nearest to the model's. `runner`: of the model, with
    the head."""
    assert runner.draft is not None
    head: Any = runner.draft._model
    block_size, seen, wanted = runner.kv_cache.block_size, [], []
    length = min(runner.max_model_len // 2, 256)
    table = [[*range(length // block_size)]]
    assert runner.draft.config.cache_specs and len(runner.kv_cache.groups) == 1
    for seed in range(_NUM_FITTED // length):
        ids = random.Random(seed).choices(range(runner.model_config.vocab_size), k=length)
        with torch.inference_mode():
            step = runner.launch(Batch([BatchRow(ids[:-1], 0, table)]))
            step.result()
            told = step.taps(0)
            assert told is not None
            logits = runner.logits(Batch([BatchRow(ids, 0, table, num_logits=length - 1)]))
            [features] = runner.draft.fuse([[told]])
            step = runner.draft.launch([BatchRow(ids[1:], 0, table, features=features)])
            step.result()
            seen.append(head._ops.norm(step.taps(0), head._norm))
        wanted.append(logits)
    x, y = torch.cat(seen).double().cpu(), torch.cat(wanted).double().cpu()
    fitted = torch.linalg.solve(x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1]), x.T @ y).T
    own_ids = head._token_ids

    weight = (fitted if own_ids is None else fitted[own_ids.cpu()]).float().contiguous()
    path = directory / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": weight}, path)
