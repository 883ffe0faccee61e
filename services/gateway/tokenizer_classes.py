"""The special tokens that a tokenizer has by its class in transformers, where no file names any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_END = "<|endoftext|>"

DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "CodeLlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "CohereTokenizer": {
        "unk_token": "<UNK>",
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "sep_token": "<SEP>",
        "mask_token": "<MASK_TOKEN>",
    },
    "GPT2Tokenizer": {"unk_token": _END, "bos_token": _END, "eos_token": _END},
    "GPTNeoXTokenizer": {
        "unk_token": _END,
        "bos_token": _END,
        "eos_token": _END,
        "pad_token": "<|padding|>",
    },
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
    "T5Tokenizer": {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"},
}
"""Of the classes that models which generate have."""

_GENERIC = "TokenizersBackend"
"""Takes all from files."""

CLASS_OF_MODEL_TYPE: Mapping[str, str] = {
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    **dict.fromkeys(("gpt2", "gptj", "gpt_neo", "opt", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "mpt", "olmo", "olmoe"), "GPTNeoXTokenizer"),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), "GemmaTokenizer"
    ),
    **dict.fromkeys(
        ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen2_vl", "qwen3_vl"),
        "Qwen2Tokenizer",
    ),
    **dict.fromkeys(
        (
            *("ernie4_5", "glm", "glm4", "glm4_moe", "gpt_bigcode", "granite", "granitemoe"),
            *("internlm2", "internlm3", "jamba", "minicpm3", "mistral", "mixtral", "nemotron"),
            *("olmo2", "olmo3", "persimmon", "phi3", "phimoe", "stablelm"),
        ),
        _GENERIC,
    ),
}
"""Where transformers knows one. A class that the files name goes before it, except that nothing
goes before `_GENERIC`, nor before what is known of `_WRONG_IN_FILES`."""

_WRONG_IN_FILES = frozenset({"qwen2"})
"""Model types whose files often name a class that they do not mean."""


def class_defaults(
    named: Any, model_config: Mapping[str, Any], *, is_byte_level: bool
) -> Mapping[str, str]:
    """By name. `named`: the class that tokenizer_config.json names, or None."""
    model_type = model_config.get("model_type")
    named = named or model_config.get("tokenizer_class")
    by_type = CLASS_OF_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    by_name = named.removesuffix("Fast") if isinstance(named, str) else None
    if by_name == "LlamaTokenizer" and is_byte_level and model_type not in _WRONG_IN_FILES:
        return {}
    if by_name is None or by_type == _GENERIC or model_type in _WRONG_IN_FILES:
        return DEFAULTS.get(by_type or "", {})
    return DEFAULTS.get(by_name, {})
