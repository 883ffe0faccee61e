"""What every process reads of a model directory, whether it computes or not.

The gateway and the launcher need no more of config.json than this. What only the engine needs, and
refuses where it cannot compute it, is read in shared/engine/models/.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from baton.shared.model_files.fields import Fields, ModelError
from baton.shared.model_files.named import missing_model
from baton.shared.model_files.type_defaults import assume_defaults, text_part

_MEDIA_TOKENS = (
    *("image_token_id", "image_token_index", "video_token_id", "audio_token_id"),
    # What stands in front of these; a processor makes the others of it.
    *("vision_start_token_id", "boi_token_id", "boi_token_index", "boa_token_id"),
)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    model_type: str
    vocab_size: int
    max_position_embeddings: int | None
    """Tokens of the longest sequence; None: the file does not say, and the type is not known."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def load_model_info(model_dir: Path) -> ModelInfo:
    """Reads config.json and generation_config.json of a Hugging Face directory.

    Raises:
        ModelError: no such directory or file, bad JSON, or a field of a wrong type.
    """
    return read_model_info(open_config(model_dir))


def open_config(model_dir: Path) -> Fields:
    """config.json, with its type's defaults.

    Raises:
        ModelError: no such directory, or no config.json with an object in it.
    """
    # Path.is_dir raises where a directory above may not be entered.
    if not os.path.isdir(model_dir):
        raise ModelError(missing_model(model_dir))
    fields = Fields.of_file(model_dir / "config.json")
    assume_defaults(fields)
    return fields


def read_model_info(fields: Fields) -> ModelInfo:
    """`fields` of config.json; generation_config.json is looked for beside it."""
    text = text_part(fields)
    vocab_size = text.integer("vocab_size")
    has_limit = text.get("max_position_embeddings") is not None
    return ModelInfo(
        model_type=fields.string("model_type"),
        vocab_size=vocab_size,
        max_position_embeddings=text.integer("max_position_embeddings") if has_limit else None,
        eos_token_ids=_eos_token_ids(fields, text, vocab_size),
        bos_token_id=_bos_token_id(fields, text, vocab_size),
    )


def load_media_tokens(model_dir: Path) -> dict[int, str]:
    """Tokens that stand where a multimodal model puts what it sees or hears → the field of
    config.json that names each.

    Raises:
        ModelError: as of `open_config`, or a field that is no token.
    """
    fields = open_config(model_dir)
    given = [name for name in _MEDIA_TOKENS if fields.get(name) is not None]
    return {fields.integer(name, least=0): name for name in given}


def served_name(model_dir: Path) -> str:
    """What a model is called by default: its directory as given, links not followed. Bytes that
    are not UTF-8 become U+FFFD: no message could carry them."""
    name = Path(os.path.normpath(model_dir.absolute())).name
    return os.fsencode(name).decode("utf-8", "replace")


def _eos_token_ids(fields: Fields, text: Fields, vocab_size: int) -> tuple[int, ...]:
    """Of generation_config.json, or of config.json, where the whole model's come before those of
    its language model."""
    own = fields.token_ids("eos_token_id", vocab_size) or text.token_ids("eos_token_id", vocab_size)
    path = fields.path.with_name("generation_config.json")
    if not path.exists():
        return own
    return Fields.of_file(path).token_ids("eos_token_id", vocab_size) or own


def _bos_token_id(fields: Fields, text: Fields, vocab_size: int) -> int | None:
    own = fields.token_id("bos_token_id", vocab_size)
    return text.token_id("bos_token_id", vocab_size) if own is None else own
