"""What the schemas of all endpoints are made of."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_Entry = TypeVar("_Entry")
# Only the first wrong entry is reported: a million of them would take seconds.
List = Annotated[list[_Entry], Field(fail_fast=True)]


def whole(value: Any) -> Any:
    """16.0 → 16: some languages write whole numbers so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(whole)]


class Fields(BaseModel):
    # Strict: "16" is no number. Unknown fields are meant for other servers, and ignored.
    model_config = ConfigDict(extra="ignore", strict=True)
