"""EAGLE-3 heads: one layer that guesses by hidden states of the model that it was trained beside.

Of a token it takes the embedding and what the model made of the token before it: three hidden
states from its middle, joined by `fc`, or, behind a guess, what the head itself made of that. Its
own vocabulary may be a part of the model's (`d2t`).

Files are as the package speculators writes them (`transformer_layer_config`), or as published heads
are (`LlamaForCausalLMEagle3`, config.json of the layer with `draft_vocab_size`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from baton.shared.engine.implementation import OwnImplementation
from baton.shared.engine.models import llama, qwen3, registry
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType
from baton.shared.model_files.fields import Fields, ModelError, shown
from baton.shared.model_files.info import open_config
from baton.shared.model_files.type_defaults import assume_defaults

if TYPE_CHECKING:
    from baton.shared.engine.model_loader import ModelLoader
    from baton.shared.engine.models.blocks import Names
    from baton.shared.engine.models.eagle3_head import Eagle3Head

NAME = "eagle3"
_PUBLISHED = "LlamaForCausalLMEagle3"
_LAYER_TYPES = ("llama", "qwen3")
_ENDS = {"embedding": "embed_tokens", "norm": "norm", "head": "lm_head", "fc": "fc"}
_OWN = {"hidden_norm": "hidden_norm", "input_norm": "input_layernorm"}
_FORMS = ({**_ENDS, "layer": "layers.0."}, {**_ENDS, "layer": "midlayer."})
"""Of the package and of published heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Config(ModelConfig):
    draft_vocab_size: int
    target_hidden_size: int
    tapped: tuple[int, ...] | None
    """Behind how many of the model's layers its hidden states are taken; None: as its authors do
    where nothing is said."""
    norm_before_residual: bool
    norm_before_fc: bool
    norms_each: bool
    """Of the hidden states, before `fc`."""
    norm_output: bool
    """What it made of a token is normalised before it comes with the next."""

    def taps_of(self, num_layers: int) -> tuple[int, ...]:
        """Of a model of so many layers."""
        return self.tapped or (2, num_layers // 2, num_layers - 3)

    @property
    def num_taps(self) -> int:
        return 3 if self.tapped is None else len(self.tapped)


def find_head(head_dir: Path) -> OwnImplementation:
    """Raises ModelError: there is none, or one that is not computed here."""
    outer = open_config(head_dir)
    return OwnImplementation(_TYPE, _configure(outer))


def check_target(
    config: Eagle3Config, head_dir: Path, target: ModelConfig, model_dir: Path
) -> None:
    """Raises ModelError for a model that the head was not made for."""
    pairs = (
        ("is for a hidden size of", config.target_hidden_size, "has", target.hidden_size),
        ("is for a vocabulary of", config.vocab_size, "has one of", target.vocab_size),
    )
    for says, own, has, of_target in pairs:
        if own != of_target:
            raise ModelError(f"draft_model: {head_dir} {says} {own}, {model_dir} {has} {of_target}")
    taps = config.taps_of(target.num_layers)
    if min(taps) < 0 or max(taps) > target.num_layers:
        raise ModelError(
            f"draft_model: {head_dir} takes hidden states behind {_listed(taps)} layers, "
            f"{model_dir} has {target.num_layers}"
        )


def _configure(outer: Fields) -> Eagle3Config:
    kind = outer.get("speculators_model_type")
    if kind is not None:
        if kind != NAME:
            raise outer.error("speculators_model_type", f"must be {NAME}, not {shown(kind)}")
        inner = outer.object("transformer_layer_config")
        if inner is None:
            raise outer.error("transformer_layer_config", "missing")
        assume_defaults(inner)
    elif _PUBLISHED in (outer.strings("architectures") or ()):
        inner = outer
    else:
        raise outer.error(
            "speculators_model_type",
            f"missing, and architectures do not name {_PUBLISHED}: this is no {NAME} head",
        )
    if (layer_type := inner.string("model_type")) not in _LAYER_TYPES:
        known = " or ".join(_LAYER_TYPES)
        raise inner.error("model_type", f"layers must be of {known}, not {shown(layer_type)}")
    _, layer = registry.configure(inner)
    if layer.num_layers != 1:
        raise inner.error("num_hidden_layers", f"only 1 is supported, not {layer.num_layers}")
    tapped = outer.integers("eagle_aux_hidden_state_layer_ids")
    if tapped is None and (inside := outer.object("eagle_config")) is not None:
        tapped = inside.integers("eagle_aux_hidden_state_layer_ids")
    own = {each.name: getattr(layer, each.name) for each in fields(ModelConfig)}
    return Eagle3Config(
        **own,
        draft_vocab_size=outer.integer(
            "draft_vocab_size", default=layer.vocab_size, most=layer.vocab_size
        ),
        target_hidden_size=outer.integer("target_hidden_size", default=layer.hidden_size),
        tapped=tuple(tapped) if tapped else None,
        norm_before_residual=outer.boolean("norm_before_residual"),
        norm_before_fc=outer.boolean("norm_before_fc"),
        norms_each=outer.boolean("fc_norm"),
        norm_output=outer.boolean("norm_output"),
    )


def _build(config: Eagle3Config, load: ModelLoader, names: Names) -> Eagle3Head:
    from baton.shared.engine.models.eagle3_head import Eagle3Head

    query = "{layer}self_attn.q_proj.weight"
    found = [each for each in _FORMS if load.header(query.format(**each)) is not None]
    of_layer = qwen3.NAMES if config.style.has_qk_norm else llama.NAMES
    return Eagle3Head(config, load, {**of_layer, **_OWN, **(found or _FORMS)[0]})


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


_TYPE = ModelType(
    NAME,
    _configure,
    _build,
    _FORMS,
    ignored_tensors=("t2d", "rotary_emb.inv_freq"),
    # What it was trained by.
    ignored_modules=("verifier_lm_head.", "verifier_norm."),
)
"""Not one of the types that are served."""
