"""What config.json says of layers with a gated delta rule, which types with such layers spell
alike. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from baton.shared.engine.models.model_config import AttentionConfig, ModelConfig
from baton.shared.kv.cache_spec import State, StateTensor
from baton.shared.model_files.fields import Fields, shown

FULL, LINEAR = "full_attention", "linear_attention"
_FULL_EVERY = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaConfig:
    """The recurrent layers of a model, which are alike."""

    num_key_heads: int
    num_value_heads: int
    """A multiple: neighbours share a key head."""
    key_dim: int
    value_dim: int
    kernel: int
    """Tokens that the convolution before the rule goes over."""

    @property
    def num_each(self) -> int:
        """Value heads of a key head."""
        return self.num_value_heads // self.num_key_heads

    @property
    def units(self) -> tuple[int, int, int]:
        """Channels of the convolution that a key head has: query, key, values."""
        return self.key_dim, self.key_dim, self.num_each * self.value_dim

    @property
    def state(self) -> State:
        """By key head. float32, whatever activations are: sums go on for the whole sequence; and
        of the convolution, for no config says what activations are."""
        return State(
            self.num_key_heads,
            (
                StateTensor("conv", (self.kernel - 1, sum(self.units)), "float32"),
                StateTensor("delta", (self.num_each, self.key_dim, self.value_dim), "float32"),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaModelConfig(ModelConfig):
    """Of a layer that has no attention, `delta` says what it has."""

    delta: DeltaConfig


def read_delta(fields: Fields) -> DeltaConfig:
    num_key_heads = fields.integer("linear_num_key_heads")
    num_value_heads = fields.integer("linear_num_value_heads")
    if num_value_heads % num_key_heads:
        raise fields.error(
            "linear_num_value_heads",
            f"{num_value_heads} is no multiple of {num_key_heads} key heads",
        )
    return DeltaConfig(
        num_key_heads=num_key_heads,
        num_value_heads=num_value_heads,
        key_dim=fields.integer("linear_key_head_dim"),
        value_dim=fields.integer("linear_value_head_dim"),
        kernel=fields.integer("linear_conv_kernel_dim", least=2),
    )


def read_linear_layers(fields: Fields) -> list[bool]:
    """Which layers have the rule in place of attention: `layer_types` says so, or all but every
    `full_attention_interval`-th have."""
    num_layers = fields.integer("num_hidden_layers")
    types = fields.strings("layer_types")
    if types is None:
        every = fields.integer("full_attention_interval", default=_FULL_EVERY)
        return [(index + 1) % every != 0 for index in range(num_layers)]
    # Where there is a list, it alone counts.
    fields.get("full_attention_interval")
    for each in types:
        if each not in (FULL, LINEAR):
            raise fields.error("layer_types", f"{shown(each)} is not supported")
    if len(types) != num_layers:
        raise fields.error(
            "layer_types", f"has {len(types)} entries for {num_layers} hidden layers"
        )
    return [each == LINEAR for each in types]


def by_layer(
    is_linear: list[bool], attention: AttentionConfig, delta: DeltaConfig
) -> dict[str, tuple[AttentionConfig | None, ...] | tuple[State | None, ...]]:
    """`layers` and `states` of a `ModelConfig`."""
    return {
        "layers": tuple(None if each else attention for each in is_linear),
        "states": tuple(delta.state if each else None for each in is_linear),
    }
