"""A model whose every answer is known beforehand: token t is always followed by `next_token[t]`.

    write_scripted_model(directory, {5: 7, 7: 9}, tokenizer=tokenizer, eos_token_id=9)

writes a llama that any engine can load. Attention and MLP are zero, so what reaches the output
matrix is the last token's embedding, and that is the code of the token to come: distinct rows of +1
and -1, whose product with the same row of the output matrix is the largest. It is small whatever
the vocabulary, and all its numbers are exact in 16 bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

_HIDDEN_SIZE = 32
"""Bits of a code. One bit apart is enough, so 2 ** 32 tokens would still differ."""
_SCALE = 32.0
"""Logits of two tokens differ by 2 * _SCALE at least: no draw at a usual temperature errs."""


def write_scripted_model(
    directory: Path,
    next_token: Mapping[int, int],
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    eos_token_id: int | list[int] | None = None,
    bos_token_id: int | None = None,
    otherwise: int | None = None,
    max_position_embeddings: int = 2048,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, str | Mapping[str, Any]] | None = None,
) -> Path:
    """Writes config.json, model.safetensors and, with `tokenizer`, tokenizer.json; returns
    `directory`.

    Tokens that `next_token` does not name are followed by `otherwise`, or by themselves. The
    vocabulary is the tokenizer's unless `vocab_size` says another. `config` adds fields to
    config.json or replaces them; `files` are written beside, objects as JSON.
    """
    if vocab_size is None:
        if tokenizer is None:
            raise ValueError("a scripted model needs tokenizer or vocab_size")
        vocab_size = 1 + max(tokenizer.get_vocab().values())
    followers = np.arange(vocab_size) if otherwise is None else np.full(vocab_size, otherwise)
    for token_id, follower in next_token.items():
        followers[token_id] = follower

    directory.mkdir(parents=True, exist_ok=True)
    codes = _codes(vocab_size)
    save_file(
        {"model.embed_tokens.weight": codes[followers], "lm_head.weight": codes * _SCALE}
        | _silent_layer(),
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": _HIDDEN_SIZE,
        "intermediate_size": _HIDDEN_SIZE,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
    }
    _write_json(directory / "config.json", {**fields, **(config or {})})
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in (files or {}).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            _write_json(path, content)
    return directory


def chain(*runs: Sequence[int]) -> dict[int, int]:
    """`next_token` of scripts that are read from left to right: `chain([5, 7, 9], [1, 7])`.

    Raises ValueError when a token would have two followers.
    """
    next_token: dict[int, int] = {}
    for run in runs:
        for token_id, follower in pairwise(run):
            if next_token.setdefault(token_id, follower) != follower:
                raise ValueError(
                    f"token {token_id} is followed by {next_token[token_id]} and by {follower}"
                )
    return next_token


def _codes(vocab_size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[vocab_size, _HIDDEN_SIZE], each row the bits of its index, over and over."""
    num_bits = max(1, (vocab_size - 1).bit_length())
    columns = np.arange(_HIDDEN_SIZE) % num_bits
    bits = (np.arange(vocab_size)[:, None] >> columns) & 1
    return (2 * bits - 1).astype(np.float32)


def _silent_layer() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    layer = "model.layers.0"
    size, kv_size = _HIDDEN_SIZE, _HIDDEN_SIZE // 2
    shapes = {
        "self_attn.q_proj": (size, size),
        "self_attn.k_proj": (kv_size, size),
        "self_attn.v_proj": (kv_size, size),
        "self_attn.o_proj": (size, size),
        "mlp.gate_proj": (size, size),
        "mlp.up_proj": (size, size),
        "mlp.down_proj": (size, size),
    }
    norms = ("model.norm", f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm")
    return {
        f"{layer}.{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()
    } | {f"{name}.weight": np.ones(size, np.float32) for name in norms}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
