"""Mamba2's mixers as config.json says them. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.kv.cache_spec import State, StateTensor
from baton.shared.model_files.fields import Fields, shown

if TYPE_CHECKING:
    from baton.kernels.reference import Activation

MAMBA, ATTENTION, MLP, MIXTURE = "linear_attention", "full_attention", "mlp", "moe"
_KINDS = {"mamba": MAMBA, "attention": ATTENTION}
"""How older files call kinds of layers → transformers' word."""
_STATE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaConfig:
    """The mixers of a model, which are alike: a convolution, a recurrence, a gate and a norm."""

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    """Runs of heads that have their b and c in common, and are normalised together."""
    conv_kernel: int
    """Tokens of the convolution."""
    activation: Activation = "silu"
    """Of the convolution."""
    has_conv_bias: bool = True
    has_input_bias: bool = False
    has_output_bias: bool = False
    dt_min: float = 0.0
    dt_max: float = float("inf")
    has_norm: bool = True
    norms_first: bool = False
    """What is gated is normalised before, not behind."""
    state_dtype: str = "float32"
    input_scale: float = 1.0
    """Of the normalised hidden state."""
    input_scales: tuple[float, ...] = (1.0,) * 5
    """Of what is made of it: gate, x, b, c and dt."""
    output_scale: float = 1.0

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def group_width(self) -> int:
        """Numbers of b, and as many of c, of all groups."""
        return self.num_groups * self.state_size

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: x, b and c."""
        return self.inner_size + 2 * self.group_width

    @property
    def group_share(self) -> int:
        """How many channels of its group's b and c a head keeps of the convolution's state."""
        heads_each = self.num_heads // self.num_groups
        return -(-2 * self.state_size // heads_each)

    @property
    def state_spec(self) -> State:
        """Of a layer. What the convolution keeps is float32, whatever the activations are: it is
        little beside the other."""
        width = self.head_dim + self.group_share
        return State(
            self.num_heads,
            (
                StateTensor("ssm", (self.head_dim, self.state_size), self.state_dtype),
                StateTensor("conv", (self.conv_kernel - 1, width), "float32"),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridConfig(ModelConfig):
    """Of a model some of whose layers, or all, have a mixer of Mamba2."""

    mamba: MambaConfig


def read_kinds(fields: Fields, name: str, kinds: Sequence[str]) -> list[str] | None:
    """A list of kinds of layers, as transformers calls them; None: not in the file.

    Args:
        kinds: those that the type has.
    """
    given = fields.strings(name)
    if given is None:
        return None
    found = [_KINDS.get(each, each) for each in given]
    for each in found:
        if each not in kinds:
            raise fields.error(name, f"{shown(each)} is not one of {', '.join(kinds)}")
    if not found:
        raise fields.error(name, "names no layer")
    return found


def check_num_layers(fields: Fields, name: str, kinds: Sequence[str]) -> None:
    """ModelError where the number of layers contradicts the list of kinds, called `name`."""
    if fields.get("num_hidden_layers") is None:
        return
    num_layers = fields.integer("num_hidden_layers")
    if num_layers != len(kinds):
        raise fields.error(name, f"has {len(kinds)} entries for num_hidden_layers {num_layers}")


def check_shape(
    fields: Fields, *, heads: str, groups: str, num_heads: int, num_groups: int
) -> None:
    """`heads` and `groups`: what the file calls them."""
    if num_heads % num_groups:
        raise fields.error(groups, f"{num_groups} does not divide {heads} {num_heads}")


def check_inner_size(
    fields: Fields, name: str, heads: str, *, what: str, inner: int, num_heads: int, head_dim: int
) -> None:
    """ModelError where heads do not make up the inner size, which is `what` in the file."""
    if num_heads * head_dim != inner:
        raise fields.error(
            name,
            f"{head_dim} times {heads} {num_heads} is not {what}, {inner}",
        )


def read_head_dim(fields: Fields, name: str, heads: str, inner: int, num_heads: int) -> int:
    """`auto`, and null, share the inner size out evenly."""
    value = fields.get(name)
    if value is not None and value != "auto":
        return fields.integer(name)
    if inner % num_heads:
        raise fields.error(heads, f"{num_heads} does not divide the inner size {inner}")
    return inner // num_heads


def read_step_limit(fields: Fields, name: str = "time_step_limit") -> dict[str, Any]:
    """`dt_min` and `dt_max`: a list of two numbers, of which the second may be infinity, in any of
    the ways in which files say that; null: none."""
    value = fields.get(name)
    if value is None:
        return {}
    limits = [_number(each) for each in value] if isinstance(value, list) else []
    if len(limits) != 2 or None in limits:
        raise fields.error(name, f"must be two numbers, not {shown(value)}")
    low, high = (each for each in limits if each is not None)
    if not 0 <= low <= high or low == float("inf"):
        raise fields.error(name, f"must be a range of positive numbers, not {shown(value)}")
    return {"dt_min": low, "dt_max": high}


def read_state_dtype(fields: Fields, name: str = "mamba_ssm_cache_dtype") -> str:
    """Null is float32."""
    dtype = fields.string(name, default="float32")
    if dtype not in _STATE_DTYPES:
        raise fields.error(name, f"must be one of {', '.join(_STATE_DTYPES)}, not {shown(dtype)}")
    return dtype


def skip(fields: Fields, *names: str) -> None:
    """Fields that say how weights were drawn, or how others cut the work up."""
    for name in names:
        fields.get(name)


def _number(value: Any) -> float | None:
    if isinstance(value, dict) and list(value) == ["__float__"]:
        value = value["__float__"]
    if value == "Infinity":
        return float("inf")
    return float(value) if isinstance(value, int | float) and value is not True else None
