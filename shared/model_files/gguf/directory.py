"""A GGUF file as a model directory: config, tokenizer and template are written beside a link to it.

    config.json                      from the metadata
    tokenizer.json, …                from the vocabulary; the template among them
    model.gguf                       the file itself, or a link to it

Every process that is given the file makes the directory in the cache folder, or finds it there: a
name tells which file it is of, as it is now.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.gguf.architectures import read_config
from baton.shared.model_files.gguf.file import WEIGHTS, GgufFile
from baton.shared.model_files.gguf.vocabulary import read_vocabulary

_FORM = 1
"""Of what is written; a directory of another one is not looked at."""


def write_directory(path: Path, directory: Path, *, generation: Mapping[str, Any]) -> None:
    """Writes all but `WEIGHTS` into `directory`, which is there. `generation`: more for
    generation_config.json.

    Raises ModelError: the file is not whole, or holds what is not known; and OSError.
    """
    file = GgufFile(path)
    vocabulary = read_vocabulary(file)
    _, config = read_config(file, vocabulary.size)
    config |= vocabulary.token_ids
    # Not a field of config.json.
    config.pop("unk_token_id", None)
    ids = {name: config[name] for name in vocabulary.token_ids if name in config}
    (directory / "tokenizer.json").write_text(vocabulary.tokenizer.to_str(), encoding="utf-8")
    length = {"model_max_length": config["max_position_embeddings"]}
    _write(directory / "tokenizer_config.json", {**vocabulary.config, **length})
    _write(directory / "generation_config.json", {**ids, **generation})
    _write(directory / "config.json", config)


def directory_of(path: Path, cache: Path) -> Path:
    """The directory of a GGUF file, made unless it is there.

    Raises ModelError: the file is not whole, holds what is not known, or the cache folder cannot be
    written.
    """
    try:
        found = path.stat()
        told = [_FORM, str(path.resolve()), found.st_size, found.st_mtime_ns]
        key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
        # What models are called by default is the last part.
        directory = cache / key / path.stem
        if not directory.is_dir():
            _make(path, directory)
    except OSError as error:
        raise ModelError(
            f"{error.filename}: {error.strerror}; what is made of a GGUF file goes to the cache "
            "folder, which BATON_CACHE_DIR names"
        ) from None
    return directory


def _make(path: Path, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=directory.parent))
    try:
        made = scratch / "made"
        made.mkdir()
        write_directory(path, made, generation={})
        (made / WEIGHTS).symlink_to(path.resolve())
        try:
            made.rename(directory)
        except OSError:
            # Another process was faster.
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
