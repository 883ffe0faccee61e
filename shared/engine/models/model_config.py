"""A model's config.json, normalised once: sizes, and by layer what attention does.

A type's file (llama.py) reads its own fields with what stands here. The rule for every field: it is
refused where the type's code in transformers reads it and the engine does not compute what it says.
All others are left unread, and named in one log line (registry.py). Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from baton.shared.engine.models.mixture_config import MixtureConfig
from baton.shared.engine.models.quantization import read_quantization
from baton.shared.engine.models.rope_config import RopeConfig
from baton.shared.engine.quantised.scheme import Quantization
from baton.shared.kv.cache_spec import CacheSpec, Full, Latent, Sliding, State
from baton.shared.model_files.fields import Fields, shown
from baton.shared.model_files.info import read_model_info

if TYPE_CHECKING:
    from baton.kernels.reference import Activation

_READ_BY_EVERY_TYPE: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "per_layer_config": ({},),
    "kv_sharing_modes": (),
}
"""Fields that transformers reads for any decoder, with the values that change nothing."""
_LAYER_TYPES = {
    "attention": "full_attention",
    "full_attention": "full_attention",
    "sliding_attention": "sliding_attention",
}
"""How files call the kinds of layers → our word, which is transformers'."""
_ACTIVATIONS: dict[str, Activation] = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(
        ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate"),
        "gelu_tanh",
    ),
}
"""How files call activations → the operations' word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Of a layer that keeps one latent of a token, of which each head makes its key and value."""

    rank: int
    """Numbers of a latent."""
    key_dim: int
    """Of a head's key, what is made of the latent; the rest of it turns, and is one for all
    heads."""
    value_dim: int
    query_rank: int | None = None
    """Queries are made of a latent of their own, of so many numbers; None: of the hidden state."""
    eps: float = 1e-6
    """Of the norms of latents."""


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """The attention of one layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    """With latents, what of a head turns."""
    rope: RopeConfig
    window: int | None = None
    """A token sees itself and the `window` − 1 tokens before it; None: all."""
    scale: float | None = None
    """Of the products of queries and keys; None: 1 / √head_dim."""
    soft_cap: float = 0.0
    """Scores are cap · tanh(score / cap); 0: as they are."""
    latent: LatentConfig | None = None
    """Keys and values are made of latents."""
    source: int | None = None
    """The layer before this one whose keys and values this one reads; None: its own."""

    @property
    def cache_spec(self) -> CacheSpec | None:
        """None: the layer caches nothing."""
        if self.source is not None:
            return None
        if self.latent is not None:
            return Latent(self.latent.rank, self.head_dim)
        if self.window is None:
            return Full(self.num_kv_heads, self.head_dim)
        return Sliding(self.num_kv_heads, self.head_dim, self.window)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStyle:
    """What the layers of a model have beside attention and a gated MLP, behind a norm each."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    residual_scale: float = 1.0
    """Of what attention and MLP add."""
    has_qk_norm: bool = False
    """Queries and keys are normalised, head by head, before they are turned."""
    has_value_norm: bool = False
    """Values are normalised too, head by head, without a weight; only with norms of the heads."""
    has_post_norms: bool = False
    """What attention and MLP add is normalised."""
    has_wide_norms: bool = False
    """Norms multiply by their weight in float32, before they round."""
    norm_plus_one: bool = False
    """Norms multiply by 1 + weight, in float32."""
    has_output_gate: bool = False
    """What each head attends to is multiplied by a sigmoid of the token."""
    has_sinks: bool = False
    """Each head has a score beside those of the keys, whose value is zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What every decoder has; a type that has more adds it in a class of its own."""

    model_type: str
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    dtype: str | None
    """Of the checkpoint's weights, as its authors say."""
    quantization: Quantization | None
    """How linear layers may be stored; None: as plain numbers."""
    layers: tuple[AttentionConfig | None, ...]
    """By layer its attention; None: it has none."""
    states: tuple[State | None, ...] = ()
    """By layer the state that it keeps, None for none; empty: no layer keeps one. It may be beside
    an attention."""
    style: LayerStyle = LayerStyle()
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    logits_soft_cap: float = 0.0
    """Logits are cap · tanh(logit / cap); 0: as they are."""
    mixture: MixtureConfig | None = None
    """Experts in place of the MLPs of some layers, or beside them."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attentions(self) -> list[AttentionConfig]:
        """Of the layers that have one."""
        return [layer for layer in self.layers if layer is not None]

    @property
    def num_heads(self) -> int:
        """Query heads, the same number in every layer that has any; 0: none has."""
        [num_heads] = {layer.num_heads for layer in self.attentions} or {0}
        return num_heads

    @property
    def head_dim(self) -> int:
        """The largest of all layers; 0: no layer attends."""
        return max((layer.head_dim for layer in self.attentions), default=0)

    @property
    def cache_specs(self) -> list[CacheSpec | None]:
        """What each layer's attention caches; then, of a model that keeps states, what each layer
        keeps as one. None: nothing."""
        attended = [None if layer is None else layer.cache_spec for layer in self.layers]
        return [*attended, *self.states]


def read_decoder(
    fields: Fields, *, reads_itself: Collection[str] = (), experts_may_be_mxfp4: bool = False
) -> dict[str, Any]:
    """The fields of `ModelConfig` that all types spell alike, but for `layers`.

    Args:
        reads_itself: fields that say nothing for other types.
    """
    return {
        **read_ends(fields, reads_itself, experts_may_be_mxfp4=experts_may_be_mxfp4),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "intermediate_size": fields.integer("intermediate_size"),
        "rms_norm_eps": fields.number("rms_norm_eps", default=1e-6),
    }


def read_ends(
    fields: Fields, reads_itself: Collection[str] = (), *, experts_may_be_mxfp4: bool = False
) -> dict[str, Any]:
    """Of what `read_decoder` gives, what says nothing of layers; a longest sequence may be None."""
    for name, neutral in _READ_BY_EVERY_TYPE.items():
        if name not in reads_itself:
            fields.only(name, *neutral)
    return {
        **asdict(read_model_info(fields)),
        "hidden_size": fields.integer("hidden_size"),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings"),
        "dtype": read_dtype(fields),
        "quantization": read_quantization(fields, experts_may_be_mxfp4=experts_may_be_mxfp4),
    }


def read_heads(fields: Fields, hidden_size: int) -> dict[str, Any]:
    """`num_heads`, `num_kv_heads` and `head_dim` of an `AttentionConfig`; null key and value heads
    are as many as query heads."""
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = read_kv_heads(fields, num_heads)
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.error("hidden_size", f"{hidden_size} is not divisible by {num_heads} heads")
    head_dim = read_head_dim(fields, default=hidden_size // num_heads)
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


def read_kv_heads(fields: Fields, num_heads: int, name: str = "num_key_value_heads") -> int:
    """Null are as many as there are query heads, `num_heads`."""
    num_kv_heads = fields.integer(name, default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(name, f"{num_kv_heads} does not divide {num_heads} attention heads")
    return num_kv_heads


def read_head_dim(fields: Fields, name: str = "head_dim", *, default: int | None = None) -> int:
    head_dim = fields.integer(name, default=default)
    if head_dim % 2:
        raise fields.error(name, f"rotary embedding needs an even size, not {head_dim}")
    return head_dim


def read_activation(fields: Fields, name: str) -> Activation:
    """What the gate of an MLP goes through."""
    value = fields.string(name)
    if value not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise fields.error(name, f"must be one of {known}, not {shown(value)}")
    return _ACTIVATIONS[value]


def read_cap(fields: Fields, name: str) -> float:
    """Of `AttentionConfig.soft_cap` or `ModelConfig.logits_soft_cap`; null is none, which is 0."""
    return 0.0 if fields.get(name) is None else fields.number(name)


def read_layer_types(fields: Fields, num_layers: int) -> list[str] | None:
    """`layer_types`, one per layer: full_attention or sliding_attention; None: not in the file."""
    types = fields.strings("layer_types")
    if types is None:
        return None
    types = [_LAYER_TYPES.get(each, each) for each in types]
    for each in types:
        if each not in _LAYER_TYPES.values():
            raise fields.error("layer_types", f"{shown(each)} is not supported")
    if len(types) != num_layers:
        raise fields.error(
            "layer_types", f"has {len(types)} entries for {num_layers} hidden layers"
        )
    return types


def read_dtype(fields: Fields) -> str | None:
    """Of the checkpoint's weights, under its new or its old name."""
    new, old = fields.get("dtype"), fields.get("torch_dtype")
    value = new if new is not None else old
    if value is not None and not isinstance(value, str):
        raise fields.error("dtype", f"must be a string, not {shown(value)}")
    return value
