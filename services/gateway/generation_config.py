"""The sampling defaults that a model brings in its generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from baton.shared.model_files.fields import ModelError
from baton.shared.sampling import FIELDS
from baton.shared.tokenizer.files import read_json_object
from baton.v1 import types_pb2

SOURCES = ("auto", "none")
"""`auto` goes by the file where there is one."""

_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""What vLLM takes of the file, and how requests call it. `do_sample` does not count."""
_NEUTRAL = {"repetition_penalty": 1.0}


def read_default_sampling(model_dir: Path, vocab_size: int) -> types_pb2.SamplingParams:
    """Only what the file says is set; nothing without a file.

    Raises ModelError naming file and field.
    """
    path = model_dir / "generation_config.json"
    values = read_json_object(path)
    fields = {field.public_name: field for field in FIELDS}
    defaults = types_pb2.SamplingParams()
    for name, public_name in _NAMES.items():
        value = values.get(name)
        if value is None or value == _NEUTRAL.get(name):
            continue
        field = fields[public_name]
        try:
            setattr(defaults, field.name, _number(name, value, vocab_size))
        except (TypeError, ValueError):
            raise ModelError(f"{path}: {name}: {str(value)[:60]} is no value for it") from None
        broken = field.limit and field.limit(getattr(defaults, field.name), vocab_size)
        if broken is not None:
            raise ModelError(f"{path}: {name}: {broken.problem}; limit: {broken.limit}")
    return defaults


def _number(name: str, value: Any, vocab_size: int) -> float:
    """Raises TypeError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(name)
    number: float = int(value) if float(value).is_integer() else value
    # What is no number of tokens is off, as -1 is.
    return 0 if name == "top_k" and not 0 < number <= vocab_size else number
