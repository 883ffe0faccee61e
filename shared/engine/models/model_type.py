"""What a model type tells the engine of itself.

Reading a config.json needs no torch: what builds a model is imported when one is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.model_files.fields import Fields

if TYPE_CHECKING:
    from baton.shared.engine.executor import Model
    from baton.shared.engine.model_loader import ModelLoader
    from baton.shared.engine.models.blocks import Names


_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")


@dataclass(frozen=True, slots=True)
class ModelType:
    name: str
    """`model_type` of config.json."""
    configure: Callable[[Fields], ModelConfig]
    """Normalises config.json; ModelError, naming the field, for what is not computed here."""
    build: Callable[[Any, ModelLoader, Names], Model]
    """The model of what `configure` returned, and of the names that the checkpoint has. It asks the
    loader for each part once, in the order of the layers, and does not look at what it gets: the
    loader may be one that reads nothing."""
    names: tuple[Names, ...]
    """What checkpoints call their modules, in every form that there is."""
    ignored_tensors: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of names that a checkpoint may hold for nothing."""
    ignored_modules: tuple[str, ...] = ()
    """Beginnings of names of what is not computed here, as what sees images; with a dot."""

    ignores_layers_ahead: bool = False
    """So are layers behind the last one, which guess tokens ahead."""

    def ignores(self, tensor: str, num_layers: int) -> bool:
        if tensor.endswith(self.ignored_tensors) or tensor.startswith(self.ignored_modules):
            return True
        layer = _LAYER.match(tensor)
        return self.ignores_layers_ahead and layer is not None and int(layer[1]) >= num_layers


def build_decoder(config: ModelConfig, load: ModelLoader, names: Names) -> Model:
    """A decoder all of whose layers are alike, as `config.style` says."""
    from baton.shared.engine.models import decoder

    return decoder.build(config, load, names)
