"""JSON that a model wrote, or a client that gives it back: for templates and for bodies."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json


def strict_json(text: str) -> Any:
    """Raises ValueError for what is none, and for what could not be written as JSON again: numbers
    that are not finite, half characters, and what is nested deeper than a request may be (200
    levels)."""
    value = from_json(text.encode(), allow_inf_nan=False, cache_strings="none")
    # `1e999` is read all the same.
    json.dumps(value, allow_nan=False)
    return value
