"""What every process reads of a model directory, whether it computes or not.

The gateway and the launcher need no more of config.json than this. What only the engine needs, and
refuses where it cannot compute it, is read in shared/engine/models/.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from baton.shared.model_files.fields import Fields, ModelError


@dataclass(frozen=True, slots=True)
class ModelInfo:
    model_type: str
    vocab_size: int
    max_position_embeddings: int | None
    """Tokens of the longest sequence; None: the file leaves it to the model type."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def load_model_info(model_dir: Path) -> ModelInfo:
    """Reads config.json and generation_config.json of a Hugging Face directory.

    Raises:
        ModelError: no such directory or file, bad JSON, or a field of a wrong type.
    """
    return read_model_info(open_config(model_dir))


def open_config(model_dir: Path) -> Fields:
    """Raises ModelError: no such directory, or no config.json with an object in it."""
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: no such model directory")
    return Fields.of_file(model_dir / "config.json")


def read_model_info(fields: Fields) -> ModelInfo:
    """`fields` of config.json; generation_config.json is looked for beside it."""
    vocab_size = fields.integer("vocab_size")
    has_limit = fields.get("max_position_embeddings") is not None
    return ModelInfo(
        model_type=fields.string("model_type"),
        vocab_size=vocab_size,
        max_position_embeddings=fields.integer("max_position_embeddings") if has_limit else None,
        eos_token_ids=_eos_token_ids(fields, vocab_size),
        bos_token_id=fields.token_id("bos_token_id", vocab_size),
    )


def served_name(model_dir: Path) -> str:
    """What a model is called by default: its directory as given, links not followed. Bytes that
    are not UTF-8 become U+FFFD: no message could carry them."""
    name = Path(os.path.normpath(model_dir.absolute())).name
    return os.fsencode(name).decode("utf-8", "replace")


def _eos_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    own = fields.token_ids("eos_token_id", vocab_size)
    path = fields.path.with_name("generation_config.json")
    if not path.exists():
        return own
    return Fields.of_file(path).token_ids("eos_token_id", vocab_size) or own
