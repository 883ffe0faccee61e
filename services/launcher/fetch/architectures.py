"""What llama.cpp's converter did to a checkpoint, by architecture, and how to undo it.

A GGUF file calls tensors and sizes by names of its own, permutes rows for its own form of rope, and
stores gemma's norms with 1 added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from baton.services.launcher.fetch.gguf_file import Array, GgufFile

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the checkpoint; numbers of rows and columns."""

    vocab: int
    hidden: int
    query: int
    """Rows of all query heads together; `key` of all key heads, and of all value heads."""
    key: int
    head: int
    mlp: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the file goes."""

    name: str
    """In the checkpoint, without `.weight`."""
    shape: tuple[str, ...]
    """Names of `Sizes`."""


@dataclass(frozen=True, slots=True)
class Architecture:
    layer: dict[str, Place]
    """By the name in the file; both behind a layer's prefix."""
    configure: Callable[[GgufFile], Config]
    """config.json without token ids and what follows from the tensors. Raises FetchError."""
    restore: Callable[[str, Array, Config], Array]
    """A tensor as the checkpoint had it. Gets its name in the file, without prefix."""


_TOP = {
    "token_embd": Place("model.embed_tokens", ("vocab", "hidden")),
    "output_norm": Place("model.norm", ("hidden",)),
    "output": Place("lm_head", ("vocab", "hidden")),
}
_LAYER = {
    "attn_norm": Place("input_layernorm", ("hidden",)),
    "attn_q": Place("self_attn.q_proj", ("query", "hidden")),
    "attn_k": Place("self_attn.k_proj", ("key", "hidden")),
    "attn_v": Place("self_attn.v_proj", ("key", "hidden")),
    "attn_output": Place("self_attn.o_proj", ("hidden", "query")),
    "ffn_gate": Place("mlp.gate_proj", ("mlp", "hidden")),
    "ffn_up": Place("mlp.up_proj", ("mlp", "hidden")),
    "ffn_down": Place("mlp.down_proj", ("hidden", "mlp")),
}
_LLAMA_LAYER = {**_LAYER, "ffn_norm": Place("post_attention_layernorm", ("hidden",))}
_GEMMA3_LAYER = {
    **_LAYER,
    "attn_q_norm": Place("self_attn.q_norm", ("head",)),
    "attn_k_norm": Place("self_attn.k_norm", ("head",)),
    "post_attention_norm": Place("post_attention_layernorm", ("hidden",)),
    "ffn_norm": Place("pre_feedforward_layernorm", ("hidden",)),
    "post_ffw_norm": Place("post_feedforward_layernorm", ("hidden",)),
}
_GEMMA3_PERIOD = 6
"""One layer in so many sees all; files do not say it, llama.cpp knows it too."""
_GEMMA3_LOCAL_THETA = 10_000.0


def read_config(file: GgufFile, vocab_size: int) -> tuple[Architecture, Config]:
    """Raises FetchError."""
    name = file.string("general.architecture")
    architecture = _ARCHITECTURES.get(name)
    if architecture is None:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise file.error("general.architecture", f"{name!r} is not one of {known}")
    config = architecture.configure(file)
    config["vocab_size"] = vocab_size
    config["tie_word_embeddings"] = "output.weight" not in file.tensor_names
    config["dtype"] = "float32"
    return architecture, config


def read_tensors(
    file: GgufFile, architecture: Architecture, config: Config
) -> Iterator[tuple[str, Array]]:
    """The checkpoint's tensors by name, one after the other.

    Raises FetchError, naming the tensor; what is missing or unknown before the first is expanded.
    """
    sizes, places = _sizes(config), dict(_TOP)
    if config["tie_word_embeddings"]:
        del places["output"]
    for index in range(config["num_hidden_layers"]):
        for name, place in architecture.layer.items():
            in_layer = Place(f"model.layers.{index}.{place.name}", place.shape)
            places[f"blk.{index}.{name}"] = in_layer
    wanted = {f"{name}.weight" for name in places}
    for missing in sorted(wanted - file.tensor_names):
        raise file.error(missing, "no such tensor")
    for unknown in sorted(file.tensor_names - wanted):
        raise file.error(unknown, "it is not known what this tensor is for")
    for name, place in places.items():
        shape = tuple(getattr(sizes, size) for size in place.shape)
        values = file.tensor(f"{name}.weight", shape)
        yield f"{place.name}.weight", architecture.restore(name.split(".")[-1], values, config)


def _sizes(config: Config) -> Sizes:
    head = config["head_dim"]
    return Sizes(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        query=config["num_attention_heads"] * head,
        key=config["num_key_value_heads"] * head,
        head=head,
        mlp=config["intermediate_size"],
    )


def _common(file: GgufFile, prefix: str) -> Config:
    """Raises FetchError for metadata whose arithmetic config.json would have to tell."""
    for key in (f"{prefix}.rope.scaling.type", f"{prefix}.expert_count"):
        if file.has(key):
            raise file.error(key, "is not expanded")
    heads = file.integer(f"{prefix}.attention.head_count")
    hidden = file.integer(f"{prefix}.embedding_length")
    return {
        "hidden_size": hidden,
        "intermediate_size": file.integer(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": file.integer(f"{prefix}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer(f"{prefix}.attention.head_count_kv", heads),
        "head_dim": file.integer(f"{prefix}.attention.key_length", hidden // max(1, heads)),
        "max_position_embeddings": file.integer(f"{prefix}.context_length"),
        "rms_norm_eps": file.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number(f"{prefix}.rope.freq_base"),
        "attention_bias": False,
    }


def _configure_llama(file: GgufFile) -> Config:
    config = _common(file, "llama")
    if file.integer("llama.rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise file.error("llama.rope.dimension_count", f"must be {config['head_dim']}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "mlp_bias": False,
        **config,
    }


def _restore_llama(name: str, values: Array, config: Config) -> Array:
    if name == "attn_q":
        return _halves(values, config["num_attention_heads"])
    if name == "attn_k":
        return _halves(values, config["num_key_value_heads"])
    return values


def _halves(rows: Array, num_heads: int) -> Array:
    """Of each head, rows 0, 1, 2, 3, … back to 0, 2, … followed by 1, 3, …: llama.cpp rotates
    neighbours, a checkpoint the two halves of a head."""
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _configure_gemma3(file: GgufFile) -> Config:
    config = _common(file, "gemma3")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        **config,
        "query_pre_attn_scalar": config["head_dim"],
        "rope_local_base_freq": _GEMMA3_LOCAL_THETA,
        "sliding_window": file.integer("gemma3.attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (index + 1) % _GEMMA3_PERIOD else "full_attention"
            for index in range(config["num_hidden_layers"])
        ],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _restore_gemma3(name: str, values: Array, config: Config) -> Array:
    return values - 1.0 if name.endswith("norm") else values


_ARCHITECTURES = {
    "llama": Architecture(_LLAMA_LAYER, _configure_llama, _restore_llama),
    "gemma3": Architecture(_GEMMA3_LAYER, _configure_gemma3, _restore_gemma3),
}
