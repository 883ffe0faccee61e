"""Layers that checkpoints ship behind the last one, which guess tokens ahead (multi-token
prediction): what they are called, and whose they are.

Of a token such a layer takes the embedding and what came of the token before it: what the model's
head reads of it, or, behind a guess, what the layer itself makes of that. One guesses a chain: of a
checkpoint that ships several, each trained for a place of the chain, the first is taken, as others
do who keep one cache of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from baton.shared.engine.implementation import OwnImplementation
from baton.shared.engine.models import registry
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.model_type import ModelType
from baton.shared.model_files.fields import ModelError, shown
from baton.shared.model_files.info import open_config
from baton.shared.telemetry import log_event

if TYPE_CHECKING:
    from pathlib import Path

    from baton.shared.engine.model_loader import ModelLoader
    from baton.shared.engine.models.blocks import Names
    from baton.shared.engine.models.mtp_head import MtpHead

logger = logging.getLogger(__name__)

_NAMES = {
    "embedding_norm": "enorm",
    "hidden_norm": "hnorm",
    "projection": "eh_proj",
    "own_norm": "shared_head.norm",
}
"""Within the layer. The embedding and the head beside them are those of the model, once more."""
_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")
_TYPES = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "kimi_k2")


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpConfig(ModelConfig):
    """Of the one layer that guesses."""

    number: int
    """Of the layer in the checkpoint: how many layers the model has."""


def find_layer(model_dir: Path) -> OwnImplementation:
    """The layer of a model's checkpoint. ModelError: it ships none, or none that is known here."""
    fields = open_config(model_dir)
    name = fields.string("model_type")
    if name not in _TYPES:
        raise ModelError(
            f"{model_dir} is a {shown(name)}, of which no layers are known that guess tokens "
            f"ahead; they are of {', '.join(_TYPES)}"
        )
    model_type, model = registry.load_model_config(model_dir)
    counts = [fields.integer(each, least=0) for each in _COUNTS if fields.has(each)]
    if not any(counts):
        said = " and ".join(each for each in _COUNTS if fields.has(each))
        raise ModelError(
            f"{model_dir} has no layers that guess tokens ahead: "
            + (f"{said} is 0" if counts else f"its config.json has no {_COUNTS[0]}")
        )
    if max(counts) > 1:
        log_event(
            logger,
            logging.INFO,
            "of several layers that guess tokens ahead the first guesses whole chains",
            model_dir=str(model_dir),
            num_layers=max(counts),
        )
    names = {**model_type.names[0], **_NAMES}
    # All else that the files have is the model's.
    layer = ModelType("mtp", _no_config, _build, (names,), ignored_modules=("",))
    return OwnImplementation(layer, _configure(model))


def _configure(model: ModelConfig) -> MtpConfig:
    """Its layer is as the model's last one."""
    own = {name: getattr(model, name) for name in ModelConfig.__dataclass_fields__}
    mixture = model.mixture
    if mixture is not None:
        mixture = replace(mixture, layers=mixture.layers[-1:])
    own |= {"layers": model.layers[-1:], "mixture": mixture}
    return MtpConfig(**own, number=model.num_layers)


def _build(config: MtpConfig, load: ModelLoader, names: Names) -> MtpHead:
    from baton.shared.engine.models.mtp_head import MtpHead

    return MtpHead(config, load, {**names, "layer": names["layer"].format(config.number)})


def _no_config(_: object) -> ModelConfig:
    raise AssertionError("no model is of this type")
