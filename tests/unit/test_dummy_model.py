"""A directory without weights that the gateway accepts."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from baton.services.gateway.tokenizer import StreamDecoder, TextCodec
from baton.shared.engine.models.registry import load_model_config
from baton.shared.model_files.info import load_model_info
from models.dummy_model import SHAPES, write_dummy_model

CHECKPOINTS = Path(__file__).parent / "engine" / "checkpoints"
TRUE_SHAPES = {
    "llama-8b": "meta-llama--Meta-Llama-3.1-8B",
    "qwen3-8b": "Qwen--Qwen3-8B",
    "mistral-7b": "mistralai--Mistral-7B-v0.1",
    "gemma3-12b": "google--gemma-3-12b-it",
    "qwen3-30b-a3b": "Qwen--Qwen3-30B-A3B",
    "gpt-oss-20b": "openai--gpt-oss-20b",
    "deepseek-v2-lite": "deepseek-ai--DeepSeek-V2-Lite",
}


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in TRUE_SHAPES])
def test_config_and_tokenizer_agree(tmp_path: Path, name: str) -> None:
    directory = write_dummy_model(tmp_path / name, SHAPES[name])
    model, codec = load_model_info(directory), TextCodec.load(directory)
    assert codec is not None
    assert model.vocab_size == SHAPES[name].vocab_size
    _, config = load_model_config(directory)
    assert config.num_layers == SHAPES[name].num_hidden_layers
    assert model.eos_token_ids == ()
    last = model.vocab_size - 1
    assert codec.is_text(last) and not codec.is_text(last + 1)
    assert codec.decode(codec.encode("Grüße")) == "Grüße"
    decoder = StreamDecoder(codec, ())
    text = decoder.push([last, 300, *codec.encode("x")]).text + decoder.finish()
    assert text == codec.decode([last, 300, *codec.encode("x")])
    codec.close()


@pytest.mark.parametrize(("name", "checkpoint"), TRUE_SHAPES.items())
def test_shapes_are_those_of_checkpoints(tmp_path: Path, name: str, checkpoint: str) -> None:
    made = write_dummy_model(tmp_path / "made", SHAPES[name], has_tokenizer=False)
    given = tmp_path / "given"
    given.mkdir()
    (given / "config.json").write_text((CHECKPOINTS / f"{checkpoint}.json").read_text())
    _, mine = load_model_config(made)
    _, theirs = load_model_config(given)
    assert mine.eos_token_ids == ()
    if name == "llama-8b":
        # Measured since before there was another rope.
        theirs = replace(
            theirs,
            layers=tuple(replace(each, rope=mine.attentions[0].rope) for each in theirs.attentions),
        )
    apart = {"model_type", "eos_token_ids", "bos_token_id", "dtype", "is_quantized", "mixture"}
    if name == "mistral-7b":
        # Its file leaves out what it was trained for.
        apart |= {"max_position_embeddings"}
    for field in {each.name for each in fields(mine)} - apart:
        assert getattr(mine, field) == getattr(theirs, field), field
    if mine.mixture is not None and theirs.mixture is not None:
        # Experts are served expanded.
        assert replace(mine.mixture, may_be_mxfp4=theirs.mixture.may_be_mxfp4) == theirs.mixture
    assert (mine.mixture is None) == (theirs.mixture is None)


def test_a_vocabulary_must_hold_every_byte(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 256"):
        write_dummy_model(tmp_path, SHAPES["tiny"].but(vocab_size=255))
