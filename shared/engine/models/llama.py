"""Llama: RMS norm, rotary grouped-query attention, SwiGLU; with or without biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton.shared.engine.config import ModelConfig, RopeConfig
from baton.shared.engine.operations import Operations
from baton.shared.kv.cache_spec import CacheGroup, CacheSpec, Full, places_of_layers

Wanted = tuple[Tensor, Sequence[Any]]
"""Which tokens of a step, int [R], and by cache group the plan of these alone."""
LoadTensor = Callable[[str], Tensor]
"""Reads a tensor of the checkpoint by name, in the engine's dtype and on its device."""


def cache_specs(config: ModelConfig) -> list[CacheSpec]:
    """What each layer caches."""
    return [Full(config.num_kv_heads, config.head_dim)] * config.num_layers


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint must hold."""
    hidden, size = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    projections = {
        "self_attn.q_proj": (q_size, hidden, config.attention_bias),
        "self_attn.k_proj": (kv_size, hidden, config.attention_bias),
        "self_attn.v_proj": (kv_size, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, q_size, config.attention_bias),
        "mlp.gate_proj": (size, hidden, config.mlp_bias),
        "mlp.up_proj": (size, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, size, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, (num_out, num_in, has_bias) in projections.items():
            shapes[f"{prefix}.{name}.weight"] = (num_out, num_in)
            if has_bias:
                shapes[f"{prefix}.{name}.bias"] = (num_out,)
    return shapes


def is_ignored_tensor(name: str) -> bool:
    """Whether a checkpoint may hold this tensor for nothing: old rope tables, a tied head."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: _Linear
    output: _Linear
    post_attention_norm: Tensor
    gate_up: _Linear
    down: _Linear


class Llama:
    """The weights and the forward pass; all state is the caller's KV cache."""

    def __init__(
        self,
        config: ModelConfig,
        load: LoadTensor,
        ops: Operations,
        groups: Sequence[CacheGroup],
        *,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self._ops = ops
        self._places = places_of_layers(groups)
        self._load = load
        self.embedding = load("model.embed_tokens.weight")
        head = self.embedding if config.tie_word_embeddings else load("lm_head.weight")
        self._head = ops.pack_weight(head)
        self._norm = load("model.norm.weight")
        self._layers = [self._load_layer(layer) for layer in range(config.num_layers)]
        cos, sin = rope_tables(config.rope, config.head_dim, max_model_len)
        self._rope = ops.pack_rope(cos.to(device), sin.to(device), dtype)

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: Sequence[Tensor],
        plans: Sequence[Any],
        wanted: Wanted | None = None,
    ) -> Tensor:
        """Runs all layers and stores the tokens' KV → [T, hidden], for `logits`.

        With `wanted`, [R, hidden] of those tokens only: of the others the last layer computes keys
        and values, and nothing that no layer is there to read.

        Args:
            input_ids, positions: int32 or int64 [T].
            kv_caches: by cache group, [blocks + 1, num_kv_heads, num_layers, 2, block_size,
                head_dim].
            plans: by cache group, where the step's tokens are stored and what they attend to.
        """
        ops, eps = self._ops, self.config.rms_norm_eps
        hidden = self.embedding.index_select(0, input_ids)
        rope = ops.take_rope(self._rope, positions)
        for index, layer in enumerate(self._layers):
            group, place = self._places[index]
            kv, plan = kv_caches[group], plans[group]
            query = self._query(layer, place, hidden, rope, kv, plan)
            if wanted is not None and index == len(self._layers) - 1:
                tokens, plan = wanted[0], wanted[1][group]
                if not len(tokens):
                    return hidden[:0]
                query, hidden = query.index_select(0, tokens), hidden.index_select(0, tokens)
            scale = 1 / math.sqrt(self.config.head_dim)
            attended = ops.paged_attention(query, kv, place, plan, scale).view(len(hidden), -1)
            hidden = ops.linear(attended, layer.output.weight, layer.output.bias, hidden)
            x = ops.norm_gate_up(
                hidden, layer.post_attention_norm, eps, layer.gate_up.weight, layer.gate_up.bias
            )
            hidden = ops.linear(x, layer.down.weight, layer.down.bias, hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden] of `hidden_states` → [R, vocab]."""
        eps = self.config.rms_norm_eps
        return self._ops.norm_linear(hidden, self._norm, eps, self._head, None)

    def _query(
        self, layer: _Layer, place: int, hidden: Tensor, rope: Any, kv: Tensor, plan: Any
    ) -> Tensor:
        """hidden [T, hidden] → [T, num_heads, head_dim]; keys and values go to the cache."""
        ops, config = self._ops, self.config
        qkv = ops.norm_linear(
            hidden, layer.input_norm, config.rms_norm_eps, layer.qkv.weight, layer.qkv.bias
        ).view(len(hidden), -1, config.head_dim)
        return ops.rope_and_store(qkv, rope, kv, place, plan, config.num_heads)

    def _load_layer(self, layer: int) -> _Layer:
        prefix = f"model.layers.{layer}"
        attention = [f"{prefix}.self_attn.{name}_proj" for name in "qkvo"]
        mlp = [f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down")]
        return _Layer(
            input_norm=self._load(f"{prefix}.input_layernorm.weight"),
            qkv=self._fused(attention[:3], has_bias=self.config.attention_bias),
            output=self._fused(attention[3:], has_bias=self.config.attention_bias),
            post_attention_norm=self._load(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._fused(mlp[:2], has_bias=self.config.mlp_bias),
            down=self._fused(mlp[2:], has_bias=self.config.mlp_bias),
        )

    def _fused(self, names: Sequence[str], *, has_bias: bool) -> _Linear:
        """Projections of the same input as one: their outputs stand side by side."""
        weight = torch.cat([self._load(f"{name}.weight") for name in names])
        bias = torch.cat([self._load(f"{name}.bias") for name in names]) if has_bias else None
        return _Linear(self._ops.pack_weight(weight), bias)


def rope_tables(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of each pair's angle: float32 [num_positions, head_dim / 2] each."""
    frequencies = _inverse_frequencies(rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair: float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.rope_type == "default":
        return plain
    # llama3: long wavelengths are stretched by `factor`, short ones kept, with a ramp between.
    turns = rope.original_max_position * plain / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain
