"""A directory without weights that the gateway accepts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baton.services.gateway.tokenizer import StreamDecoder, TextCodec
from baton.shared.engine.models.registry import load_model_config
from baton.shared.model_files.info import load_model_info
from models.dummy_model import SHAPES, write_dummy_model


@pytest.mark.parametrize("name", SHAPES)
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


def test_a_vocabulary_must_hold_every_byte(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 256"):
        write_dummy_model(tmp_path, replace(SHAPES["tiny"], vocab_size=255))
