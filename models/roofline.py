"""The least time that a step of a model takes, from what it must read and multiply: pure functions.

What is counted: weights of linear layers, experts and the head; keys and values, within the window
where a layer has one. What is not: norms, biases, activations, routing, the draw, the embedding.
States are read and written. Of models whose layers are an attention, or a gated delta rule, and an
MLP, or a mixture of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.shared.engine.models.delta_config import DeltaModelConfig
from baton.shared.engine.models.mamba_config import HybridConfig
from baton.shared.engine.models.model_config import AttentionConfig, ModelConfig

_ITEM = 2
"""Bytes of a weight, a key's or a value's number: bfloat16."""
_ROUTER_ITEM = 4
"""Routers are float32."""


@dataclass(frozen=True)
class Rates:
    """What a device can do at best."""

    bytes_per_s: float
    flop_per_s: float
    """Of large matrix products."""
    attention_flop_per_s: float
    """Of the best kernels of attention over a prompt."""
    float8_flop_per_s: float | None = None
    """Of large products of 8-bit floats; None: as of others."""

    def product_s(self, layers: float, head: float, quantization: str | None) -> float:
        """Of so many operations in the layers, and in the head, which is not made small."""
        is_float8 = quantization in ("fp8", "fp8-blocks") and self.float8_flop_per_s is not None
        of_layers = self.float8_flop_per_s if is_float8 else None
        return layers / (of_layers or self.flop_per_s) + head / self.flop_per_s


WEIGHT_ITEMS: dict[str | None, float] = {
    None: _ITEM,
    "fp8": 1,
    "fp8-blocks": 1,
    "int8": 1,
    "int4": 0.5 + 4 / 128,
}
"""Bytes of a weight of attention or an MLP, by what makes it small; scales of rows do not count."""


def decode_floor_s(
    model: ModelConfig,
    batch: int,
    context: int,
    rates: Rates,
    *,
    experts_hit: float | None = None,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
) -> float:
    """Of a step in which `batch` sequences with so many tokens draw one each: weights are read
    once, or multiplied by, whichever takes longer; then keys and values are read, and states are
    read and written.

    `experts_hit`: of a mixture, experts that are read, the mean of the layers; None: as many as
    would be if all were chosen equally often. `quantization`: of `WEIGHT_ITEMS`.
    `kv_cache_dtype`: as the engine's.
    """
    num_bytes = step_weight_bytes(model, batch, experts_hit, quantization)
    read_s = num_bytes / rates.bytes_per_s
    layers, head = (2 * batch * each(model) for each in (num_weights_of_a_token, num_head_weights))
    kv_bytes = batch * (context_bytes(model, context, kv_cache_dtype) + 2 * state_bytes(model))
    product_s = rates.product_s(layers, head, quantization)
    return max(read_s, product_s) + kv_bytes / rates.bytes_per_s


def prefill_floor_s(
    model: ModelConfig, num_tokens: int, rates: Rates, *, quantization: str | None = None
) -> float:
    """Of a prompt with so many tokens, until its first one is drawn."""
    layers = 2 * num_weights_of_a_token(model) * num_tokens
    product_s = rates.product_s(layers, 2 * num_head_weights(model), quantization)
    read_s = step_weight_bytes(model, num_tokens, None, quantization) / rates.bytes_per_s
    attention_s = attention_flop(model, num_tokens) / rates.attention_flop_per_s
    return max(product_s, read_s) + attention_s


def behind_floor_s(
    model: ModelConfig, num_tokens: int, num_cached: int, rates: Rates, kv_cache_dtype: str = "auto"
) -> float:
    """As `prefill_floor_s`, of tokens behind others that are cached: keys and values of these are
    read, or attended to, whichever takes longer."""
    whole, cached = (attention_flop(model, n) for n in (num_cached + num_tokens, num_cached))
    read_s = context_bytes(model, num_cached, kv_cache_dtype) / rates.bytes_per_s
    own_s = attention_flop(model, num_tokens) / rates.attention_flop_per_s
    attention_s = max((whole - cached) / rates.attention_flop_per_s, read_s)
    return prefill_floor_s(model, num_tokens, rates) - own_s + attention_s


def mixed_floor_s(
    model: ModelConfig,
    batch: int,
    context: int,
    num_tokens: int,
    rates: Rates,
    kv_cache_dtype: str = "auto",
) -> float:
    """Of a step in which `batch` sequences with so many tokens draw one each, beside a prompt's
    chunk of `num_tokens`."""
    num_rows = batch + num_tokens
    flop = 2 * (num_weights_of_a_token(model) * num_rows + num_head_weights(model) * (batch + 1))
    read_s = step_weight_bytes(model, num_rows) / rates.bytes_per_s
    attention_s = attention_flop(model, num_tokens) / rates.attention_flop_per_s
    kv_s = batch * context_bytes(model, context, kv_cache_dtype) / rates.bytes_per_s
    return max(flop / rates.flop_per_s, read_s) + attention_s + kv_s


def step_weight_bytes(
    model: ModelConfig,
    num_tokens: int,
    experts_hit: float | None = None,
    quantization: str | None = None,
) -> float:
    """What a step of so many tokens reads of the weights, each once."""
    num_dense = _num_layer_weights(model)
    num_bytes: float = WEIGHT_ITEMS[quantization] * num_dense + _ITEM * num_head_weights(model)
    if model.mixture is not None:
        rule, num_layers = model.mixture.routing, sum(model.mixture.layers)
        if experts_hit is None:
            experts_hit = expected_hits(rule.num_experts, rule.top_k, num_tokens)
        num_bytes += _ITEM * num_layers * experts_hit * _num_expert_weights(model)
        num_bytes += _ROUTER_ITEM * num_layers * rule.num_experts * model.hidden_size
    return num_bytes


def expected_hits(num_experts: int, top_k: int, num_tokens: int) -> float:
    """How many of the experts of a layer some token has, if all are chosen equally often."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


def num_weights_of_a_token(model: ModelConfig) -> int:
    """Weights that every token is multiplied by, the head's not among them."""
    num_weights = _num_layer_weights(model)
    if model.mixture is not None:
        rule = model.mixture.routing
        of_a_layer = rule.top_k * _num_expert_weights(model) + rule.num_experts * model.hidden_size
        num_weights += sum(model.mixture.layers) * of_a_layer
    return num_weights


def num_head_weights(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size


def context_bytes(model: ModelConfig, context: int, kv_cache_dtype: str = "auto") -> int:
    """Keys and values that a token reads behind `context` − 1 others."""
    return sum(
        _kept_bytes(each, kv_cache_dtype) * min(context, each.window or context)
        for each in model.attentions
    )


def state_bytes(model: ModelConfig) -> int:
    """What a sequence's layers keep as states."""
    return sum(state.block_bytes(1, 1, _ITEM) for state in model.states if state is not None)


def attention_flop(model: ModelConfig, num_tokens: int) -> int:
    """Of a prompt's causal attention, in all layers; with latents, once they are expanded."""
    return sum(
        2 * each.num_heads * sum(_head_dims(each)) * num_pairs(num_tokens, each.window)
        for each in model.attentions
    )


def num_pairs(num_tokens: int, window: int | None) -> int:
    """Of a token and one that it sees, itself included."""
    seen = min(num_tokens, window or num_tokens)
    return seen * (seen + 1) // 2 + (num_tokens - seen) * seen


def _head_dims(layer: AttentionConfig) -> tuple[int, int]:
    """Of a head's key and value."""
    if layer.latent is None:
        return layer.head_dim, layer.head_dim
    return layer.latent.key_dim + layer.head_dim, layer.latent.value_dim


def _num_kept(layer: AttentionConfig) -> int:
    """Numbers that a layer reads of a token before."""
    if layer.latent is None:
        return 2 * layer.num_kv_heads * layer.head_dim
    return layer.latent.rank + layer.head_dim


def _kept_bytes(layer: AttentionConfig, kv_cache_dtype: str) -> int:
    num_kept = _num_kept(layer)
    if kv_cache_dtype == "auto":
        return _ITEM * num_kept
    # A byte of each, and one for each key or value of a head: its scale.
    return num_kept + num_kept // layer.head_dim


def _num_layer_weights(model: ModelConfig) -> int:
    """Of all layers, but for experts that not every token has."""
    return _num_attention_weights(model) + _num_mixer_weights(model) + _num_mlp_weights(model)


def _num_attention_weights(model: ModelConfig) -> int:
    """Queries and output, and where a layer has its own, keys and values; and of layers with a
    gated delta rule, all that they multiply by."""
    num_weights = sum(
        _num_attention_weights_of(layer, model.hidden_size) for layer in model.attentions
    )
    if model.style.has_output_gate:
        num_weights += model.hidden_size * sum(
            layer.num_heads * layer.head_dim for layer in model.attentions
        )
    if isinstance(model, DeltaModelConfig):
        own = model.delta
        of_layer = own.num_key_heads * sum(own.units)
        of_layer += own.num_value_heads * (2 * own.value_dim + 2)
        num_linear = model.num_layers - len(model.attentions)
        num_weights += num_linear * of_layer * model.hidden_size
    return num_weights


def _num_attention_weights_of(layer: AttentionConfig, hidden_size: int) -> int:
    if layer.latent is None:
        num_kv_heads = layer.num_kv_heads if layer.source is None else 0
        return 2 * hidden_size * layer.head_dim * (layer.num_heads + num_kv_heads)
    latent = layer.latent
    key_dim, value_dim = _head_dims(layer)
    queries = hidden_size * layer.num_heads * key_dim
    if latent.query_rank is not None:
        queries = latent.query_rank * (hidden_size + layer.num_heads * key_dim)
    latents = hidden_size * (latent.rank + layer.head_dim)
    of_heads = latent.rank * layer.num_heads * (latent.key_dim + value_dim)
    return queries + latents + of_heads + layer.num_heads * value_dim * hidden_size


def _num_mixer_weights(model: ModelConfig) -> int:
    """What mixers of Mamba2 multiply by; convolutions are left out."""
    if not isinstance(model, HybridConfig):
        return 0
    own, num_mixers = model.mamba, sum(state is not None for state in model.states)
    num_outputs = 2 * own.inner_size + own.conv_size + own.num_heads
    return num_mixers * model.hidden_size * num_outputs


def _num_mlp_weights(model: ModelConfig) -> int:
    """Of MLPs, and of experts that every token has."""
    if model.model_type == "mamba2":
        return 0
    sizes = model.intermediate_size * model.num_layers
    if model.mixture is not None:
        num_layers = sum(model.mixture.layers)
        sizes = model.intermediate_size * (model.num_layers - num_layers)
        sizes += model.mixture.shared_size * num_layers
    return 3 * model.hidden_size * sizes


def _num_expert_weights(model: ModelConfig) -> int:
    assert model.mixture is not None
    return 3 * model.hidden_size * model.mixture.expert_size
