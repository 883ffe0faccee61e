"""What llama.cpp's converter did to a checkpoint, by architecture.

A GGUF file calls tensors and sizes by names of its own, permutes rows for its own form of rope, and
stores gemma's norms with 1 added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from baton.shared.model_files.gguf.file import GgufFile

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
    """config.json without token ids and what follows from the tensors. Raises ModelError."""
    turned: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose rows llama.cpp has put in its own order, and the field of config.json that says
    how many heads they have."""
    norms_plus_one: bool = False
    """Weights of norms are stored with 1 added."""
    biases: tuple[str, ...] = ()
    """Tensors that have one, beside those of `layer`."""


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
_HEAD_NORMS = {
    "attn_q_norm": Place("self_attn.q_norm", ("head",)),
    "attn_k_norm": Place("self_attn.k_norm", ("head",)),
}
_QWEN3_LAYER = {**_LLAMA_LAYER, **_HEAD_NORMS}
_GEMMA3_LAYER = {
    **_LAYER,
    **_HEAD_NORMS,
    "post_attention_norm": Place("post_attention_layernorm", ("hidden",)),
    "ffn_norm": Place("pre_feedforward_layernorm", ("hidden",)),
    "post_ffw_norm": Place("post_feedforward_layernorm", ("hidden",)),
}
_GEMMA3_PERIOD = 6
"""One layer in so many sees all; files do not say it, llama.cpp knows it too."""
_GEMMA3_LOCAL_THETA = 10_000.0


def read_config(file: GgufFile, vocab_size: int) -> tuple[Architecture, Config]:
    """Raises ModelError."""
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


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a checkpoint's tensor lies in the file, and what has become of it there."""

    name: str
    shape: tuple[int, ...]
    num_heads: int | None = None
    """Its rows are turned, in runs of a head; None: they are not."""
    is_plus_one: bool = False


def find_tensors(file: GgufFile, architecture: Architecture, config: Config) -> dict[str, Stored]:
    """By the checkpoint's name.

    Raises ModelError, naming the tensor that is missing, has another shape, or is not known.
    """
    sizes, places = _sizes(config), dict(_TOP)
    if config["tie_word_embeddings"]:
        del places["output"]
    for index in range(config["num_hidden_layers"]):
        for name, place in architecture.layer.items():
            in_layer = Place(f"model.layers.{index}.{place.name}", place.shape)
            places[f"blk.{index}.{name}"] = in_layer
    found = {}
    for name, place in places.items():
        own = name.split(".")[-1]
        shape = tuple(getattr(sizes, size) for size in place.shape)
        heads = architecture.turned.get(own)
        found[f"{place.name}.weight"] = Stored(
            f"{name}.weight",
            shape,
            None if heads is None else config[heads],
            architecture.norms_plus_one and own.endswith("norm"),
        )
        if own in architecture.biases:
            found[f"{place.name}.bias"] = Stored(f"{name}.bias", shape[:1])
    _check(file, found.values())
    return found


def _check(file: GgufFile, stored: Iterable[Stored]) -> None:
    shapes = {each.name: each.shape for each in stored}
    for missing in sorted(shapes.keys() - file.tensor_names):
        raise file.error(missing, "no such tensor")
    for unknown in sorted(file.tensor_names - shapes.keys()):
        raise file.error(unknown, "it is not known what this tensor is for")
    for name, shape in shapes.items():
        if file.shape(name) != shape:
            raise file.error(name, f"has the shape {list(file.shape(name))}, not {list(shape)}")


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
    """Raises ModelError for metadata whose arithmetic config.json would have to tell."""
    for key in (f"{prefix}.rope.scaling.type", f"{prefix}.expert_count"):
        if file.has(key):
            raise file.error(key, "is not read")
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


def _configure_qwen(name: str, title: str) -> Callable[[GgufFile], Config]:
    def configure(file: GgufFile) -> Config:
        config = _common(file, name)
        return {
            "architectures": [f"{title}ForCausalLM"],
            "model_type": name,
            "hidden_act": "silu",
            "use_sliding_window": False,
            **config,
        }

    return configure


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


_TURNED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
_ARCHITECTURES = {
    "llama": Architecture(_LLAMA_LAYER, _configure_llama, turned=_TURNED),
    "qwen2": Architecture(
        _LLAMA_LAYER, _configure_qwen("qwen2", "Qwen2"), biases=("attn_q", "attn_k", "attn_v")
    ),
    "qwen3": Architecture(_QWEN3_LAYER, _configure_qwen("qwen3", "Qwen3")),
    "gemma3": Architecture(_GEMMA3_LAYER, _configure_gemma3, norms_plus_one=True),
}
