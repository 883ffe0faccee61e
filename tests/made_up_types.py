"""Model types that tests make up: the engine knows them while a test needs them, and no longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from baton.shared.engine.models import registry
from baton.shared.engine.models.model_type import ModelType


@contextmanager
def known(model_type: ModelType) -> Iterator[None]:
    """The engine knows the type, and forgets it again: other tests ask for all that there are."""
    before = dict(registry._TYPES)
    registry.register(model_type)
    try:
        yield
    finally:
        registry._TYPES.clear()
        registry._TYPES.update(before)
