"""Small GGUF files as llama.cpp's converter would write them, and the checkpoints that they stand
for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

F32, F16, Q8_0, Q4_1 = Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġ Ġ", "1 2"]
SMOLLM_TOKENS = [
    *_SPECIAL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in _MERGES),
]
_CONTROL, _NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE = 3, 1, 2, 4, 6
_GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
_GEMMA_USER = ["<table>", "\n\n"]
_GEMMA_NORMAL = ["\n", "▁", "h", "e", "l", "o", "he", "ll", "  ", "hell", "hello", "▁h", "▁he"]
GEMMA_TOKENS = [
    *_GEMMA_SPECIAL,
    *_GEMMA_USER,
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *_GEMMA_NORMAL,
]


def llama(vocab_size: int = len(SMOLLM_TOKENS), *, tied: bool = True) -> LlamaForCausalLM:
    """Three query heads for each of two key heads; all rows a multiple of 32, as blocks want it."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    _draw_norms(model)
    return model


def gemma(vocab_size: int = len(GEMMA_TOKENS)) -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=512,
        sliding_window=8,
        initializer_range=0.3,
    )
    model = Gemma3ForCausalLM(config)
    _draw_norms(model)
    return model


def _draw_norms(model: torch.nn.Module) -> None:
    """No constants, so that one taken for another is seen."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(weight + torch.rand_like(weight))
    model.eval()


def write_llama(
    path: Path,
    model: LlamaForCausalLM,
    *,
    kinds: Mapping[str, Kind] = {},
    drop: str = "",
    extra: Mapping[str, Any] = {},
    metadata: Mapping[str, Any] = {},
) -> dict[str, np.ndarray[Any, Any]]:
    """`kinds`: how numbers are stored, by the tensor's name without its prefix; `drop`: a tensor
    that is left out; `extra`: more tensors; `metadata`: instead of what would be there, None: not.

    Returns what the checkpoint's tensors are once they were stored so.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    fields = {
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": 100_000.0,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": SMOLLM_TOKENS,
        "tokenizer.ggml.token_type": [
            _CONTROL if token in _SPECIAL else _NORMAL for token in SMOLLM_TOKENS
        ],
        "tokenizer.ggml.merges": _MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    _add_fields(writer, fields | dict(metadata))
    stored = {}
    for name, weight in _state(model).items():
        ours = _LLAMA_NAMES[name.split(".")[-2]]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        full = _file_name(name, ours)
        values = _interleaved(weight, heads[ours]) if ours in heads else weight
        kind = kinds.get(ours, F32)
        data = gguf.quantize(values, kind)
        rounded = gguf.dequantize(data, kind).astype(np.float32).reshape(values.shape)
        stored[name] = _halves(rounded, heads[ours]) if ours in heads else rounded
        if full != drop:
            writer.add_tensor(full, data, raw_dtype=kind)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    _finish(writer)
    return stored


def write_qwen(path: Path, model: Any, *, pre: str = "qwen2") -> None:
    """Of qwen2 or qwen3. Rows are not turned there, and biases are stored."""
    config, name = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, name)
    fields = {
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": config.hidden_size // config.num_attention_heads,
        f"{name}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": SMOLLM_TOKENS,
        "tokenizer.ggml.token_type": [_NORMAL] * len(SMOLLM_TOKENS),
        "tokenizer.ggml.merges": _MERGES,
        "tokenizer.ggml.eos_token_id": 2,
    }
    _add_fields(writer, fields)
    own_norms = {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
    for full, values in _state(model).items():
        *_, module, kind = full.split(".")
        ours = own_norms.get(module) or _LLAMA_NAMES[module]
        writer.add_tensor(_file_name(full, ours).replace(".weight", f".{kind}"), values)
    _finish(writer)


def write_gemma(path: Path, model: Gemma3ForCausalLM, metadata: Mapping[str, Any] = {}) -> None:
    config, writer = model.config, gguf.GGUFWriter(path, "gemma3")
    fields = {
        "gemma3.context_length": config.max_position_embeddings,
        "gemma3.embedding_length": config.hidden_size,
        "gemma3.block_count": config.num_hidden_layers,
        "gemma3.feed_forward_length": config.intermediate_size,
        "gemma3.attention.head_count": config.num_attention_heads,
        "gemma3.attention.head_count_kv": config.num_key_value_heads,
        "gemma3.attention.key_length": config.head_dim,
        "gemma3.attention.value_length": config.head_dim,
        "gemma3.rope.freq_base": 1_000_000.0,
        "gemma3.attention.sliding_window": config.sliding_window,
        "gemma3.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": GEMMA_TOKENS,
        "tokenizer.ggml.scores": [-1000.0] * len(GEMMA_TOKENS),
        "tokenizer.ggml.token_type": [_gemma_kind(token) for token in GEMMA_TOKENS],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    _add_fields(writer, fields | dict(metadata))
    for name, weight in _state(model).items():
        ours = _GEMMA_NAMES[name.split(".")[-2]]
        values = weight + 1.0 if "norm" in ours else weight
        writer.add_tensor(_file_name(name, ours), values.astype(np.float32))
    _finish(writer)


_COMMON_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_LLAMA_NAMES = {**_COMMON_NAMES, "post_attention_layernorm": "ffn_norm"}
_GEMMA_NAMES = {
    **_COMMON_NAMES,
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _state(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    is_tied = model.config.tie_word_embeddings
    return {
        name: weight.float().numpy()
        for name, weight in model.state_dict().items()
        if not (is_tied and name == "lm_head.weight")
    }


def _file_name(name: str, ours: str) -> str:
    parts = name.split(".")
    return f"blk.{parts[2]}.{ours}.weight" if parts[1] == "layers" else f"{ours}.weight"


def _interleaved(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Row i of a head's first half, then row i of its second: what llama.cpp rotates together."""
    result = np.empty_like(rows)
    size = len(rows) // num_heads
    for head in range(num_heads):
        own = rows[head * size : (head + 1) * size]
        result[head * size : (head + 1) * size : 2] = own[: size // 2]
        result[head * size + 1 : (head + 1) * size : 2] = own[size // 2 :]
    return result


def _halves(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    heads = rows.reshape(num_heads, -1, rows.shape[1])
    return np.concatenate([heads[:, ::2], heads[:, 1::2]], axis=1).reshape(rows.shape)


def _gemma_kind(token: str) -> int:
    if token in _GEMMA_SPECIAL:
        return _CONTROL
    if token in _GEMMA_USER:
        return _USER_DEFINED
    return _BYTE if token.startswith("<0x") else _NORMAL


def _add_fields(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
