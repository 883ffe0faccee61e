"""What a model type tells the engine of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.model_files.fields import Fields

if TYPE_CHECKING:
    from baton.shared.engine.executor import Model
    from baton.shared.engine.model_loader import ModelLoader


@dataclass(frozen=True, slots=True)
class ModelType:
    name: str
    """`model_type` of config.json."""
    configure: Callable[[Fields], ModelConfig]
    """Normalises config.json; ModelError, naming the field, for what is not computed here."""
    build: Callable[[Any, ModelLoader], Model]
    """The model of what `configure` returned. It asks the loader for each part once, in the order
    of the layers, and does not look at what it gets: the loader may be one that reads nothing."""
    ignored_tensors: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of names that a checkpoint may hold for nothing."""
