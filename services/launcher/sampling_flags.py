"""The flags of `baton generate` that say how tokens are drawn: those that shared/sampling.py
declares."""

from __future__ import annotations

import argparse
from typing import Any

from baton.services.launcher.flag_types import biases, token_ids, uint32, uint64, utf8
from baton.shared.sampling import FIELDS, Kind, SamplingField
from baton.v1 import types_pb2


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (defaults are the gateway's)")
    for field in FIELDS:
        flag = _flag(field)
        help = f"do not {field.help}" if flag.startswith("--no-") else field.help
        group.add_argument(flag, dest=field.name, help=help, **_how_to_read(field))


def sampling_of(args: argparse.Namespace) -> types_pb2.SamplingParams:
    """Only what was given is set: the gateway knows the defaults, and checks the ranges."""
    return types_pb2.SamplingParams(**{field.name: getattr(args, field.name) for field in FIELDS})


def _flag(field: SamplingField) -> str:
    """A switch that is on is switched off."""
    is_on = field.kind is Kind.SWITCH and field.default
    return ("--no-" if is_on else "--") + field.public_name.replace("_", "-")


def _how_to_read(field: SamplingField) -> dict[str, Any]:
    metavar = {"metavar": field.metavar}
    match field.kind:
        case Kind.NUMBER:
            return {"type": float, **metavar}
        case Kind.COUNT | Kind.MAYBE_COUNT:
            return {"type": uint32, **metavar}
        case Kind.SEED:
            return {"type": uint64, **metavar}
        case Kind.SWITCH:
            return {"action": "store_false" if field.default else "store_true", "default": None}
        case Kind.TOKEN_IDS:
            return {"type": token_ids, **metavar}
        case Kind.TEXTS:
            return {"type": utf8, "action": "append", **metavar}
        case Kind.BIASES:
            return {"type": biases, **metavar}
