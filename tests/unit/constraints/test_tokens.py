"""The bytes that llguidance is told are those that streams make of the tokens."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from baton.services.gateway.tokenizer import TextCodec
from baton.shared.constraints.compiler import compile_constraint
from baton.shared.constraints.matcher import AnswerMatcher
from baton.shared.constraints.tokens import TokenTable
from baton.v1 import types_pb2


def metaspace(*steps: decoders.Decoder) -> Tokenizer:
    """Words with a space in front, and bytes for what the vocabulary lacks."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁yes", "yes", "▁no", "e", "s", "y", "{", '"', "▁{"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<s>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(list(steps))
    return tokenizer


TOKENIZERS: dict[str, list[decoders.Decoder]] = {
    "bare Metaspace": [decoders.Metaspace()],
    "sentencepiece": [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ],
}


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return int(token_id)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_are_the_text_of_a_stream(name: str) -> None:
    tokenizer = metaspace(*TOKENIZERS[name])
    codec, table = TextCodec(tokenizer, None), TokenTable(tokenizer, 300, [1])
    has_bytes = name != "bare Metaspace"
    for token_id in range(2, tokenizer.get_vocab_size()):
        stream = codec.new_text_stream()
        stream.follow([id_of(tokenizer, "yes")])
        text = stream.feed(token_id) + stream.flush()
        if "\ufffd" not in text:
            assert table.token_bytes[token_id] == text.encode()
    assert table.token_bytes[id_of(tokenizer, "▁yes")] == b" yes"
    if has_bytes:
        assert table.token_bytes[id_of(tokenizer, "<0xE2>")] == b"\xe2"
    # The model's vocabulary is padded.
    assert len(table.token_bytes) == 300 and table.token_bytes[-1] == b""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_masks_over_it(name: str) -> None:
    tokenizer = metaspace(*TOKENIZERS[name])
    table = TokenTable(tokenizer, 300, [1])
    choices = types_pb2.Constraint(choices=types_pb2.Choices(texts=["yes", " no"]))
    going = AnswerMatcher(compile_constraint(choices, table))
    mask = going.masks()[0]
    allowed = {token_id for token_id in range(300) if mask[token_id // 32] >> (token_id % 32) & 1}
    assert {"yes", "y", "▁no", "▁"} <= {tokenizer.id_to_token(each) for each in allowed}
    assert id_of(tokenizer, "▁yes") not in allowed and 1 not in allowed
    going.take([id_of(tokenizer, "yes")])
    [*ends] = [i for i in range(300) if going.masks()[0][i // 32] >> (i % 32) & 1]
    assert ends == [1]


def test_what_a_text_is_written_in(table: TokenTable) -> None:
    assert b"".join(table.token_bytes[each] for each in table.encode("nö <|eos|>".encode())) == (
        "nö <|eos|>".encode()
    )
    assert not set(table.encode(b"<|eos|>")) & set(table.special_ids.values())
    cut = "é".encode()[:1]
    assert b"".join(table.token_bytes[each] for each in table.encode(cut)) == cut
    assert table.split("a<|end|>b<|eos|>") == ["a", 5, "b", 1]
