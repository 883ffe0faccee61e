"""A model directory of any shape, without weights: config.json and a synthetic tokenizer.json.

    python -m models.dummy_model DIR [--shape llama-8b|tiny]

Workers serve it with `--load-format dummy`. The tokenizer has an entry for every token id, so that
whatever random weights draw is turned into text, at a real vocabulary's cost. There is no
end-of-sequence token: answers have the length that was asked for.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama, named as in config.json; at least 256 tokens in the vocabulary."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5


SHAPES = {
    # Llama-3.1-8B.
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128, 128_256, 131_072),
    # For trials on a CPU.
    "tiny": Shape(128, 256, 2, 4, 2, 32, 2048, 16_384),
}


def write_dummy_model(directory: Path, shape: Shape) -> Path:
    """Writes the two files; returns `directory`, which is made when it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        # None ends an answer.
        "eos_token_id": None,
        **asdict(shape),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _tokenizer(shape.vocab_size).save(str(directory / "tokenizer.json"), pretty=False)
    return directory


@contextmanager
def given_or_dummy(given: Path | None, shape: str) -> Iterator[Path]:
    """The directory that was given, or a dummy one of that name in `SHAPES`, gone afterwards."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="baton-dummy-") as scratch:
        yield write_dummy_model(Path(scratch) / shape, SHAPES[shape])


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
