"""A model directory of a well-known shape without weights: config.json, synthetic tokenizer.json.

    python -m models.dummy_model DIR [--shape NAME]

Workers serve it with `--load-format dummy`. The tokenizer has an entry for every token id, so that
whatever random weights draw is turned into text, at a real vocabulary's cost. There is no
end-of-sequence token: answers have the length that was asked for.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


@dataclass(frozen=True)
class Shape:
    """A model of some type: what its config.json says, but for what all shapes have in common."""

    fields: Mapping[str, Any]
    """As in config.json, `model_type` among them; at least 256 tokens in the vocabulary."""

    @property
    def vocab_size(self) -> int:
        return int(self.fields["vocab_size"])

    @property
    def num_hidden_layers(self) -> int:
        return int(self.fields["num_hidden_layers"])

    def but(self, **fields: Any) -> Shape:
        """The same with other values."""
        return Shape({**self.fields, **fields})

    def of_layers(self, num_layers: int) -> Shape:
        """Its first layers."""
        fields: dict[str, Any] = {"num_hidden_layers": num_layers}
        if "layer_types" in self.fields:
            fields["layer_types"] = self.fields["layer_types"][:num_layers]
        return self.but(**fields)


_LLAMA_8B = Shape(
    {
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
    }
)
_LLAMA_1B = _LLAMA_8B.but(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    head_dim=64,
    tie_word_embeddings=True,
)
_QWEN3_8B = Shape(
    {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    }
)
_MISTRAL_7B = Shape(
    {
        "model_type": "mistral",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32_000,
        "max_position_embeddings": 32_768,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
    }
)
_GEMMA3_12B = Shape(
    {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000,
        "rope_local_base_freq": 10_000,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rms_norm_eps": 1e-6,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    }
)
_QWEN3_30B_A3B = Shape(
    {
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    }
)
# Experts in the activations' dtype, as MXFP4 is expanded.
_QWEN3_5_35B_A3B = Shape(
    {
        "model_type": "qwen3_5_moe_text",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "vocab_size": 248_320,
        "max_position_embeddings": 262_144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
        },
        "rms_norm_eps": 1e-6,
    }
)
_GPT_OSS_20B = Shape(
    {
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "num_hidden_layers": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201_088,
        "max_position_embeddings": 131_072,
        "rope_theta": 150_000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
    }
)
_DEEPSEEK_V2_LITE = Shape(
    {
        "model_type": "deepseek_v2",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_size": 2048,
        "intermediate_size": 10_944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 102_400,
        "max_position_embeddings": 163_840,
        "rope_theta": 10_000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
        "rms_norm_eps": 1e-6,
    }
)
_TINY: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
}
_MAMBA2_3B = Shape(
    {
        "model_type": "mamba2",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "hidden_size": 2560,
        "num_hidden_layers": 64,
        "num_heads": 80,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "expand": 2,
        "conv_kernel": 4,
        "vocab_size": 50_288,
        "layer_norm_epsilon": 1e-5,
    }
)
SHAPES = {
    "llama-8b": _LLAMA_8B,  # Llama 3.1
    "llama-1b": _LLAMA_1B,  # Llama 3.2
    "qwen3-8b": _QWEN3_8B,
    "mistral-7b": _MISTRAL_7B,  # 0.1, the one with windows
    "gemma3-12b": _GEMMA3_12B,
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "gpt-oss-20b": _GPT_OSS_20B,
    "deepseek-v2-lite": _DEEPSEEK_V2_LITE,
    "qwen3.5-35b-a3b": _QWEN3_5_35B_A3B,
    "mamba2-2.7b": _MAMBA2_3B,
    # What it caches, and little else: for hand-offs.
    "qwen3.5-35b-a3b-few": _QWEN3_5_35B_A3B.but(num_experts=16, num_experts_per_tok=4),
    # For trials on a CPU.
    "tiny": _LLAMA_8B.but(**_TINY, num_hidden_layers=2, max_position_embeddings=16_384),
    "tiny-draft": _LLAMA_8B.but(**_TINY, num_hidden_layers=1, max_position_embeddings=16_384),
    "tiny-qwen3": _QWEN3_8B.of_layers(2).but(**_TINY),
    "tiny-mistral": _MISTRAL_7B.of_layers(2).but(**_TINY, sliding_window=64),
    "tiny-gemma3": _GEMMA3_12B.of_layers(6).but(
        **_TINY, query_pre_attn_scalar=32, sliding_window=32
    ),
    "tiny-qwen3-moe": _QWEN3_30B_A3B.of_layers(2).but(
        **_TINY, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=4
    ),
    "tiny-qwen3.5": _QWEN3_5_35B_A3B.of_layers(4).but(
        **_TINY,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
    ),
    "tiny-mamba2": _MAMBA2_3B.of_layers(2).but(
        hidden_size=128, num_heads=4, state_size=32, vocab_size=512
    ),
    "tiny-gpt-oss": _GPT_OSS_20B.of_layers(2).but(
        **_TINY, num_local_experts=8, num_experts_per_tok=2, sliding_window=32
    ),
    "tiny-deepseek": _DEEPSEEK_V2_LITE.of_layers(2).but(
        **{**_TINY, "num_key_value_heads": 4},
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
}


def write_dummy_model(directory: Path, shape: Shape, *, has_tokenizer: bool = True) -> Path:
    """Writes the two files; returns `directory`, which is made when it is not there.

    `has_tokenizer`: False leaves that out, which takes seconds with a large vocabulary.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # None ends an answer.
    config = {**shape.fields, "torch_dtype": "bfloat16", "eos_token_id": None}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if has_tokenizer:
        _tokenizer(shape.vocab_size).save(str(directory / "tokenizer.json"), pretty=False)
    return directory


@contextmanager
def given_or_dummy(
    given: Path | None, shape: str, *, num_layers: int | None = None, has_tokenizer: bool = True
) -> Iterator[Path]:
    """The directory that was given, or a dummy one of that name in `SHAPES`, gone afterwards.

    `num_layers`: only the first ones of the dummy's.
    """
    if given is not None:
        yield given
        return
    chosen = SHAPES[shape] if num_layers is None else SHAPES[shape].of_layers(num_layers)
    with tempfile.TemporaryDirectory(prefix="baton-dummy-") as scratch:
        yield write_dummy_model(Path(scratch) / shape, chosen, has_tokenizer=has_tokenizer)


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level, without merges: text becomes bytes, every other token is a made-up word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet):
        raise ValueError(f"vocab_size: at least {len(alphabet)}, not {vocab_size}")
    words = [*alphabet, *islice(_words(), vocab_size - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _words() -> Iterator[str]:
    """A blank, as byte-level vocabularies write it, and four letters; 456,976 of them."""
    for letters in product(ascii_lowercase, repeat=4):
        yield "Ġ" + "".join(letters)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models.dummy_model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    args = parser.parse_args(argv)
    print(write_dummy_model(args.directory, SHAPES[args.shape]))


if __name__ == "__main__":
    main()
