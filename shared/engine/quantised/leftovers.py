"""Tensors of quantised checkpoints that are not computed with: why each may be left out."""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch

from baton.shared.engine.weights import WeightFiles
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

_NOT_QUANTISED_HERE = tuple(
    f".{what}_{kind}"
    for what in ("input", "output", "activation", "k", "v", "q", "kv")
    for kind in ("scale", "zero_point", "global_scale")
)
"""Activations, and keys and values, are kept in a dtype of their own."""


def leave_out(untaken: Collection[str], files: WeightFiles) -> set[str]:
    """Those of the tensors that a model has not taken that change nothing: scales of what is not
    quantised here, which is logged, and biases and zeros that are nothing but zeros."""
    scales = {name for name in untaken if name.endswith(_NOT_QUANTISED_HERE)}
    if scales:
        log_event(
            logger,
            logging.INFO,
            "scales of activations, keys and values are not used: none of these is quantised so",
            num_tensors=len(scales),
            example=min(scales),
        )
    return scales | {name for name in untaken if _is_nothing(name, files)}


def _is_nothing(name: str, files: WeightFiles) -> bool:
    module, _, suffix = name.rpartition(".")
    header = files.header(name)
    if header is None or suffix not in ("bias", "weight_zero_point"):
        return False
    if suffix == "bias" and files.header(f"{module}.qweight") is None:
        return False
    return not bool(torch.any(files.read(name, header.shape, torch.device("cpu")) != 0))
