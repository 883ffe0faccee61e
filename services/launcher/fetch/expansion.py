"""A GGUF file becomes a Hugging Face directory: config.json, float32 safetensors, the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import save_file

from baton.services.launcher.fetch.architectures import read_config, read_tensors
from baton.services.launcher.fetch.download import FetchError
from baton.services.launcher.fetch.gguf_file import Array, GgufFile
from baton.services.launcher.fetch.vocabulary import read_vocabulary


def expand(
    path: Path,
    directory: Path,
    *,
    generation: Mapping[str, Any],
    on_tensor: Callable[[int, int], None],
) -> None:
    """Writes into `directory`, which is there. `generation`: more for generation_config.json.
    `on_tensor` hears how many tensors of how many are expanded.

    Raises FetchError: the file is not whole, or holds what is not known how to expand; and OSError.
    """
    file = GgufFile(path)
    vocabulary = read_vocabulary(file)
    architecture, config = read_config(file, vocabulary.size)
    config |= vocabulary.token_ids
    # Not a field of config.json.
    config.pop("unk_token_id", None)
    tensors: dict[str, Array] = {}
    for name, values in read_tensors(file, architecture, config):
        tensors[name] = values
        on_tensor(len(tensors), len(file.tensor_names))
    try:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, say
        raise FetchError(f"{directory / 'model.safetensors'}: {error}") from None
    ids = {name: config[name] for name in vocabulary.token_ids if name in config}
    (directory / "tokenizer.json").write_text(vocabulary.tokenizer.to_str(), encoding="utf-8")
    length = {"model_max_length": config["max_position_embeddings"]}
    _write(directory / "tokenizer_config.json", {**vocabulary.config, **length})
    _write(directory / "generation_config.json", {**ids, **generation})
    _write(directory / "config.json", config)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
