"""What a tokenizer has by its class in transformers: special tokens, where no file names any, and
steps around the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

SPACE = "▁"
"""How sentencepiece models write it."""
_END = "<|endoftext|>"
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

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
        (
            *("qwen2", "qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_next"),
            "qwen3_vl",
        ),
        "Qwen2Tokenizer",
    ),
    **dict.fromkeys(
        (
            *("ernie4_5", "glm", "glm4", "glm4_moe", "gpt_bigcode", "granite", "granitemoe"),
            *("internlm2", "internlm3", "jamba", "minicpm3", "ministral", "ministral3", "mistral"),
            *("mistral3", "mixtral", "nemotron"),
            *("olmo2", "olmo3", "persimmon", "phi3", "phimoe", "stablelm"),
        ),
        _GENERIC,
    ),
}
"""Where transformers knows one. A class that the files name goes before it, except that nothing
goes before `_GENERIC`, nor before what is known of `_WRONG_IN_FILES`."""

_WRONG_IN_FILES = frozenset({"qwen2"})
"""Model types whose files often name a class that they do not mean."""


def tokenizer_class(named: Any, model_config: Mapping[str, Any], *, is_byte_level: bool) -> str:
    """The class's name. `named`: what tokenizer_config.json names, or None."""
    model_type = model_config.get("model_type")
    named = named or model_config.get("tokenizer_class")
    by_type = CLASS_OF_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    by_name = named.removesuffix("Fast") if isinstance(named, str) else None
    if by_name == "LlamaTokenizer" and is_byte_level and model_type not in _WRONG_IN_FILES:
        return _GENERIC
    if by_name is None or by_type == _GENERIC or model_type in _WRONG_IN_FILES:
        return by_type or _GENERIC
    return by_name


def put_together(name: str, tokenizer: Tokenizer, config: Mapping[str, Any]) -> bool:
    """Sets the steps around a BPE model that are the class's own, whatever tokenizer.json says of
    them; False for a class that has none here. `config`: what tokenizer_config.json holds."""
    adds_space = config.get("add_prefix_space")
    if name == "LlamaTokenizer":
        tokenizer.model.fuse_unk = tokenizer.model.byte_fallback = True
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer, tokenizer.decoder = space_steps(
            begins_with_space=adds_space is None or bool(adds_space),
            is_legacy=bool(config.get("legacy")),
        )
    elif name == "GPT2Tokenizer":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(adds_space))
        tokenizer.decoder = decoders.ByteLevel()
    elif name == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=bool(adds_space), use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
    else:
        return False
    return True


def space_steps(
    *, begins_with_space: bool, is_legacy: bool
) -> tuple[pre_tokenizers.PreTokenizer, decoders.Decoder]:
    """sentencepiece's way with spaces, before and after its model. A text begins with a space that
    is not in it; in old models so does what follows a special token."""
    scheme = ("always" if is_legacy else "first") if begins_with_space else "never"
    pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    first = [decoders.Strip(" ", 1, 0)] if begins_with_space else []
    decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first]
    )
    return pre_tokenizer, decoder
