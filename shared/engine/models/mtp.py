"""Layers that checkpoints ship behind the last one, which guess tokens ahead (multi-token
prediction): what they are called, and whose they are.

Of a token such a layer takes the embedding and what came of the token before it: what the model's
head reads of it, or, behind a guess, what the layer itself makes of that. One guesses a chain: of a
checkpoint that ships several, each trained for a place of the chain, the first is taken, as others
do who keep one cache of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from baton.shared.engine.implementation import OwnImplementation, Weights
from baton.shared.engine.models import registry
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.weights import DummyWeights
from baton.shared.model_files.fields import ModelError, shown
from baton.shared.model_files.info import open_config
from baton.shared.model_files.type_defaults import text_part
from baton.shared.telemetry import log_event

if TYPE_CHECKING:
    from pathlib import Path

    from baton.shared.engine.model_loader import ModelLoader
    from baton.shared.engine.models.blocks import Names
    from baton.shared.engine.models.mtp_head import MtpHead

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How checkpoints have such a layer. In names {} is how many layers the model has."""

    layer: str
    """What the names of the layer's modules begin with."""
    others: Mapping[str, str]
    """Of the modules around it."""
    counts: Sequence[str]
    """Fields of config.json, any of which says how many such layers there are."""
    may_be_uncounted: bool = False
    """Where there is no such field, there is one layer."""


_BEHIND = _Spelling(
    "model.layers.{}.",
    {
        "embedding_norm": "model.layers.{}.enorm",
        "hidden_norm": "model.layers.{}.hnorm",
        "projection": "model.layers.{}.eh_proj",
        "own_norm": "model.layers.{}.shared_head.norm",
    },
    ("num_nextn_predict_layers", "num_mtp_layers"),
)
"""Behind the last layer. Embedding and head beside it are those of the model, once more."""
_BESIDE = _Spelling(
    "mtp.layers.0.",
    {
        "embedding_norm": "mtp.pre_fc_norm_embedding",
        "hidden_norm": "mtp.pre_fc_norm_hidden",
        "projection": "mtp.fc",
        "own_norm": "mtp.norm",
    },
    ("mtp_num_hidden_layers", "num_nextn_predict_layers"),
    may_be_uncounted=True,
)
"""Beside the model."""
_SPELLINGS = {
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "glm4_moe_lite", "kimi_k2"), _BEHIND),
    "qwen3_next": _BESIDE,
    **{f"{name}{part}": _BESIDE for name in ("qwen3_5", "qwen3_5_moe") for part in ("", "_text")},
}
"""By model type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpConfig(ModelConfig):
    """Of the one layer that guesses."""


def find_layer(model_dir: Path) -> OwnImplementation:
    """The layer of a model's checkpoint. ModelError: it ships none, or none that is known here."""
    fields = open_config(model_dir)
    name = fields.string("model_type")
    spelling = _SPELLINGS.get(name)
    if spelling is None:
        raise ModelError(
            f"{model_dir} is a {shown(name)}, of which no layers are known that guess tokens "
            f"ahead; they are of {', '.join(_SPELLINGS)}"
        )
    model_type, model = registry.load_model_config(model_dir)
    text = text_part(fields)
    named = [each for each in spelling.counts if text.has(each)]
    counts = [text.integer(each, least=0) for each in named]
    if not counts and spelling.may_be_uncounted:
        counts = [1]
    if not any(counts):
        raise ModelError(
            f"{model_dir} has no layers that guess tokens ahead: "
            + (
                f"{' and '.join(named)} is 0"
                if counts
                else f"its config.json has no {spelling.counts[0]}"
            )
        )
    # Else it has an embedding of its own.
    text.only("mtp_use_dedicated_embeddings", False)
    if not model.attentions:
        raise ModelError(
            f"{model_dir} has a layer that guesses tokens ahead, which attends as a layer of the "
            "model does, and no layer of the model attends"
        )
    if max(counts) > 1:
        log_event(
            logger,
            logging.INFO,
            "of several layers that guess tokens ahead the first guesses whole chains",
            model_dir=str(model_dir),
            num_layers=max(counts),
        )
    own = {"layer": spelling.layer, **spelling.others}
    names = {
        **model_type.names[0],
        **{each: module.format(model.num_layers) for each, module in own.items()},
    }
    # All else that the files have is the model's.
    layer = ModelType("mtp", _no_config, _build, (names,), ignored_modules=("",))
    return OwnImplementation(layer, _configure(model))


def check_ships(layer: OwnImplementation, weights: Weights, model_dir: Path) -> None:
    """ModelError: of such a layer the files have nothing, as of checkpoints that others saved anew,
    whatever config.json says."""
    [names] = layer.model_type.names
    norms = [f"{names[each]}.weight" for each in ("embedding_norm", "hidden_norm", "own_norm")]
    if not isinstance(weights, DummyWeights) and not any(map(weights.header, norms)):
        raise ModelError(
            f"{model_dir} ships no layer that guesses tokens ahead: its files have no {norms[0]}"
        )


def _configure(model: ModelConfig) -> MtpConfig:
    """Its layer is as the model's last one that attends."""
    last = max(index for index, layer in enumerate(model.layers) if layer is not None)
    own = {name: getattr(model, name) for name in ModelConfig.__dataclass_fields__}
    mixture = model.mixture
    if mixture is not None:
        mixture = replace(mixture, layers=(mixture.layers[last],))
    own |= {"layers": (model.layers[last],), "states": (), "mixture": mixture}
    return MtpConfig(**own)


def _build(config: MtpConfig, load: ModelLoader, names: Names) -> MtpHead:
    from baton.shared.engine.models.mtp_head import MtpHead

    return MtpHead(config, load, names)


def _no_config(_: object) -> ModelConfig:
    raise AssertionError("no model is of this type")
