"""The scripted model keeps to its script, here and in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.e2e.oracle import Ask, Oracle
from tests.scripted_model import chain, write_scripted_model

SCRIPT = chain([5, 4999, 0, 1, 2, 4096, 77, 9], [300, 77])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scripted")
    return write_scripted_model(directory, SCRIPT, vocab_size=5000, eos_token_id=9)


def test_every_token_has_the_follower_that_the_script_names(model: Path) -> None:
    oracle = Oracle(model)
    greedy = Ask([300, 5], {"max_tokens": 8})
    assert oracle.answer(greedy) == [4999, 0, 1, 2, 4096, 77, 9, 9]
    assert oracle.answer(Ask([5, 300], {"ignore_eos": False})) == [77, 9]
    drawn = {"temperature": 2.0, "seed": 3, "max_tokens": 8}
    assert oracle.answer(Ask([300, 5], drawn)) == oracle.answer(greedy)


def test_transformers_reads_the_same_script(model: Path) -> None:
    theirs = LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    logits = theirs(torch.arange(5000)[:, None]).logits[:, 0]
    expected = torch.arange(5000)
    for token_id, follower in SCRIPT.items():
        expected[token_id] = follower
    assert torch.equal(logits.argmax(-1), expected)


def test_a_script_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="token 2 is followed by 3 and by 4"):
        chain([1, 2, 3], [2, 4])
