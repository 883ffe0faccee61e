"""StreamDecoder: whatever the tokens and however they come, the text is the one-shot decode."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.services.gateway.tokenizer import Delta, StreamDecoder, TextCodec

KINDS = ("byte_level", "metaspace", "byte_fallback", "word_piece", "no_decoder")
# Every tokenizer here has fewer tokens than this: the rest are ids that it does not know.
TOKEN_IDS = st.lists(st.integers(0, 520), max_size=40)
CUTS = st.lists(st.integers(0, 40), max_size=8)


def groups(token_ids: list[int], cuts: list[int]) -> list[list[int]]:
    borders = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    return [token_ids[a:b] for a, b in zip(borders, borders[1:], strict=False)]


def run(decoder: StreamDecoder, pushes: list[list[int]]) -> tuple[str, int]:
    """(all the text, how many tokens were used)."""
    deltas = [decoder.push(token_ids) for token_ids in pushes]
    text = "".join(delta.text for delta in deltas)
    return text + decoder.finish(), sum(delta.num_tokens_used for delta in deltas)


def texts_by_length(codec: TextCodec, stops: list[str], token_ids: list[int]) -> list[str]:
    """What is out after 0, 1, 2 … tokens that were pushed one by one."""
    decoder = StreamDecoder(codec, stops)
    texts = [""]
    for token_id in token_ids:
        texts.append(texts[-1] + decoder.push([token_id]).text)
    return texts


def first_stop(text: str, stops: list[str]) -> int:
    return min((text.find(stop) for stop in stops if stop in text), default=len(text))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300)
@given(token_ids=TOKEN_IDS, cuts=CUTS)
def test_text_is_the_one_shot_decode_in_any_grouping(
    codecs_by_kind: dict[str, TextCodec], kind: str, token_ids: list[int], cuts: list[int]
) -> None:
    codec = codecs_by_kind[kind]
    pushes = groups(token_ids, cuts)
    assert run(StreamDecoder(codec, ()), pushes) == (codec.decode(token_ids), len(token_ids))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300)
@given(token_ids=TOKEN_IDS, cuts=CUTS)
def test_special_tokens_that_are_shown_are_text_as_any_other(
    codecs_by_kind: dict[str, TextCodec], kind: str, token_ids: list[int], cuts: list[int]
) -> None:
    codec, pushes = codecs_by_kind[kind], groups(token_ids, cuts)
    text = codec.decode(token_ids, skip_special=False)
    assert run(StreamDecoder(codec, (), skip_special=False), pushes) == (text, len(token_ids))
    stops = ["</s>", "e<s>"]
    got, _ = run(StreamDecoder(codec, stops, skip_special=False), pushes)
    assert got == text[: first_stop(text, stops)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(token_ids=TOKEN_IDS, cuts=CUTS, stops=st.lists(st.sampled_from("aeno"), max_size=3))
def test_a_stop_that_is_included_is_the_last_of_the_text(
    codecs_by_kind: dict[str, TextCodec],
    kind: str,
    token_ids: list[int],
    cuts: list[int],
    stops: list[str],
) -> None:
    codec, pushes = codecs_by_kind[kind], groups(token_ids, cuts)
    plain, included = StreamDecoder(codec, stops), StreamDecoder(codec, stops, include_stop=True)
    text, num_used = run(plain, pushes)
    assert run(included, pushes) == (text + (plain.stop or ""), num_used)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300)
@given(data=st.data(), token_ids=TOKEN_IDS, cuts=CUTS)
def test_text_ends_before_the_earliest_stop(
    codecs_by_kind: dict[str, TextCodec],
    kind: str,
    data: st.DataObject,
    token_ids: list[int],
    cuts: list[int],
) -> None:
    codec = codecs_by_kind[kind]
    text = codec.decode(token_ids)
    starts = st.integers(0, max(0, len(text) - 1))
    pieces = st.builds(lambda start, size: text[start : start + size], starts, st.integers(1, 12))
    # Pieces of the text with one character wrong at the end are what nearly stops it.
    near = st.builds(lambda piece, end: piece + end, pieces, st.sampled_from("e \ufffdz"))
    stops = [stop for stop in data.draw(st.lists(pieces | near, min_size=1, max_size=4)) if stop]
    decoder = StreamDecoder(codec, stops)
    got, num_used = run(decoder, groups(token_ids, cuts))

    end = first_stop(text, stops)
    assert got == text[:end]
    assert decoder.stopped == (end < len(text))
    ends = [stop for stop in stops if end < len(text) and text.startswith(stop, end)]
    assert decoder.stop == min(ends, key=len, default=None)
    one_by_one = StreamDecoder(codec, stops)
    assert run(one_by_one, [[token_id] for token_id in token_ids]) == (got, num_used)
    # Without the last of the tokens used the stop could not be told.
    if num_used < len(token_ids):
        shorter = StreamDecoder(codec, stops)
        assert not shorter.push(token_ids[: num_used - 1]).stopped
        assert shorter.push(token_ids[num_used - 1 : num_used]).stopped


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(token_ids=TOKEN_IDS, other=TOKEN_IDS, count=st.integers(0, 40))
def test_text_out_after_k_tokens_depends_on_these_only(
    codecs_by_kind: dict[str, TextCodec],
    kind: str,
    token_ids: list[int],
    other: list[int],
    count: int,
) -> None:
    codec = codecs_by_kind[kind]
    stops = ["the", "日本", "e t"]
    count = min(count, len(token_ids))
    out = texts_by_length(codec, stops, token_ids)
    # A resumed answer: what the client has is pushed at once and its text dropped.
    resumed = StreamDecoder(codec, stops)
    dropped = resumed.push(token_ids[:count]).text
    assert dropped == out[count]
    rest = run(resumed, [token_ids[count:]])[0]
    assert dropped + rest == run(StreamDecoder(codec, stops), [token_ids])[0]
    # Whatever follows, what is out stays right.
    assert run(StreamDecoder(codec, stops), [token_ids[:count], other])[0].startswith(dropped)


@settings(max_examples=300)
@given(token_ids=TOKEN_IDS)
def test_byte_level_holds_back_nothing_but_a_cut_character(
    byte_level: TextCodec, token_ids: list[int]
) -> None:
    raw = b"".join(byte_level.token_bytes(token_id) for token_id in token_ids)
    out = texts_by_length(byte_level, [], token_ids)[-1]
    whole = byte_level.decode(token_ids)
    if out == whole:
        return
    tails = (raw[start:] for start in range(max(0, len(raw) - 3), len(raw)))
    held = next(tail for tail in tails if out + tail.decode(errors="replace") == whole)
    assert len(held) < next(num_bytes for lead, num_bytes in _LEADS if held[0] >= lead)


_LEADS = [(0xF0, 4), (0xE0, 3), (0xC2, 2)]
"""From which first byte on a character has how many bytes."""


def ids_of_bytes(codec: TextCodec, raw: bytes) -> list[int]:
    by_bytes = {codec.token_bytes(token_id): token_id for token_id in range(500)}
    return [by_bytes[bytes([byte])] for byte in raw]


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        ("é".encode(), ["", "é"]),
        ("🏃".encode(), ["", "", "", "🏃"]),
        # No continuation byte: the cut character is lost, the next one is not.
        (b"\xe2\x82A", ["", "", "\ufffdA"]),
        # Never the start of a character: replaced at once.
        (b"\xff\xffA", ["\ufffd", "\ufffd", "A"]),
        # Too long a form, beyond the last code point, and a surrogate: byte by byte.
        (b"\xe0\x80\x80", ["", "\ufffd\ufffd", "\ufffd"]),
        (b"\xf4\x90", ["", "\ufffd\ufffd"]),
        (b"\xed\xa0\x80", ["", "", "\ufffd\ufffd\ufffd"]),
        # A replacement character that the model wrote itself.
        ("\ufffd!".encode(), ["", "", "\ufffd", "!"]),
    ],
)
def test_when_bytes_become_text(byte_level: TextCodec, raw: bytes, texts: list[str]) -> None:
    decoder = StreamDecoder(byte_level, ())
    assert [decoder.push([token_id]).text for token_id in ids_of_bytes(byte_level, raw)] == texts
    assert decoder.finish() == ""


def test_a_character_cut_at_the_end_comes_with_finish(byte_level: TextCodec) -> None:
    decoder = StreamDecoder(byte_level, ())
    assert decoder.push(ids_of_bytes(byte_level, b"A\xf0\x9f")).text == "A"
    assert decoder.finish() == "\ufffd"


def byte_ids(codec: TextCodec, raw: bytes) -> list[int]:
    first = min(token_id for token_id in range(520) if codec.is_byte(token_id))
    return [first + byte for byte in raw]


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        ("日é".encode(), ["", "", "日", "", "é"]),
        (b"\n\n", ["\n", "\n"]),
        # One wrong byte spoils nothing before it, and each wrong byte is one character.
        (b"\xc3\xa9\xff\xc3\xa9", ["", "é", "\ufffd", "", "é"]),
        (b"\xe6\x97\xc3\xa9", ["", "", "\ufffd\ufffd", "é"]),
        ("\ufffd!".encode(), ["", "", "\ufffd", "!"]),
    ],
)
def test_when_fallback_bytes_become_text(
    byte_fallback: TextCodec, raw: bytes, texts: list[str]
) -> None:
    decoder = StreamDecoder(byte_fallback, ())
    assert decoder.push(ids_of(byte_fallback, "e")).text == "e"
    assert [decoder.push([token_id]).text for token_id in byte_ids(byte_fallback, raw)] == texts


def test_fallback_bytes_that_a_word_cuts_off_are_replaced(byte_fallback: TextCodec) -> None:
    decoder = StreamDecoder(byte_fallback, ())
    [word] = ids_of(byte_fallback, "e")
    assert decoder.push(byte_ids(byte_fallback, b"\xe6\x97")).text == ""
    assert decoder.push([word]).text == "\ufffd\ufffde"
    assert decoder.push(byte_ids(byte_fallback, b"\xe6")).text == ""
    assert decoder.finish() == "\ufffd"


def test_a_space_that_begins_the_text_is_dropped_in_bytes_too(byte_fallback: TextCodec) -> None:
    spaces = byte_ids(byte_fallback, b"  ")
    assert StreamDecoder(byte_fallback, ()).push(spaces).text == " "
    assert byte_fallback.decode(spaces) == " "


def ids_of(codec: TextCodec, text: str) -> list[int]:
    """One token a character."""
    by_text = {codec.decode([token_id]): token_id for token_id in range(500)}
    return [by_text[character] for character in text]


def pushes(codec: TextCodec, stops: list[str], text: str) -> list[Delta]:
    decoder = StreamDecoder(codec, stops)
    return [decoder.push([token_id]) for token_id in ids_of(codec, text)]


def test_text_is_held_only_while_it_may_become_a_stop(byte_level: TextCodec) -> None:
    texts = [delta.text for delta in pushes(byte_level, ["stop"], "a sto s stx")]
    assert texts == ["a", " ", "", "", "", "sto ", "", "s ", "", "", "stx"]


def test_a_stop_that_starts_within_a_failed_one_is_found(byte_level: TextCodec) -> None:
    assert pushes(byte_level, ["aab"], "aaab")[-1] == Delta("", True, 1)
    assert "".join(delta.text for delta in pushes(byte_level, ["aab"], "aaab")) == "a"


def test_of_two_stops_the_earlier_start_wins(byte_level: TextCodec) -> None:
    """`bc` is complete first, but `abcd` would end the text before it: the answer waits."""
    stops = ["bc", "abcd"]
    assert [delta.stopped for delta in pushes(byte_level, stops, "xabcd")] == [False] * 4 + [True]
    assert "".join(delta.text for delta in pushes(byte_level, stops, "xabcd")) == "x"
    assert pushes(byte_level, stops, "xabcx")[-1] == Delta("a", True, 1)


def test_a_stop_that_waited_for_another_ends_the_text_at_finish(byte_level: TextCodec) -> None:
    decoder = StreamDecoder(byte_level, ["bc", "abcd"])
    assert decoder.push(ids_of(byte_level, "xabc")) == Delta("x", False, 4)
    assert decoder.stop is None
    assert decoder.finish() == "a"
    assert decoder.stopped and decoder.stop == "bc"


def test_of_two_stops_with_one_start_the_shorter_decides(byte_level: TextCodec) -> None:
    for stops in (["ab", "abc"], ["abc", "ab"]):
        decoder = StreamDecoder(byte_level, stops)
        assert decoder.push(ids_of(byte_level, "xabc")) == Delta("x", True, 3)
        assert decoder.stop == "ab"


def test_tokens_after_a_stop_are_not_used(byte_level: TextCodec) -> None:
    decoder = StreamDecoder(byte_level, ["t"])
    assert decoder.push(ids_of(byte_level, "catalogue")) == Delta("ca", True, 3)
    assert decoder.push(ids_of(byte_level, "cat")) == Delta("", True, 0)
    assert decoder.finish() == ""


def test_a_stop_across_tokens_and_cut_characters(byte_level: TextCodec) -> None:
    token_ids = ids_of_bytes(byte_level, "où ça?".encode())
    decoder = StreamDecoder(byte_level, ["ù ç"])
    deltas = [decoder.push([token_id]) for token_id in token_ids]
    assert [delta.text for delta in deltas] == ["o"] + [""] * 7
    assert [delta.num_tokens_used for delta in deltas] == [1] * 6 + [0] * 2


def test_a_stop_may_be_the_replacement_of_a_cut_character(byte_level: TextCodec) -> None:
    decoder = StreamDecoder(byte_level, ["\ufffd"])
    assert decoder.push(ids_of_bytes(byte_level, b"A\xf0")) == Delta("A", False, 2)
    assert decoder.finish() == ""
    assert decoder.stopped


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_unknown_tokens_yield_no_text(
    codecs_by_kind: dict[str, TextCodec], kind: str
) -> None:
    codec = codecs_by_kind[kind]
    word = codec.encode("word", add_special_tokens=False)
    silent = [0, 1, 2, 100_000, 2**32 - 1]
    mixed = [0, 1, *(t for token_id in word for t in (token_id, *silent))]
    assert run(StreamDecoder(codec, ()), [mixed])[0] == codec.decode(word)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_a_token_does_not_grow_with_the_answer(
    codecs_by_kind: dict[str, TextCodec], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = codecs_by_kind[kind]
    num_decoded: list[int] = []
    decode = codec.decode

    def counted(token_ids: Sequence[int]) -> str:
        num_decoded.append(len(token_ids))
        return decode(token_ids)

    monkeypatch.setattr(codec, "decode", counted)
    words = codec.encode("the word was with the baton.")
    # The same token for ever, as models that have lost their way give it.
    token_ids = words * 50 + [0, *words[:1]] * 500
    decoder = StreamDecoder(codec, ["never"])
    for token_id in token_ids:
        decoder.push([token_id])
    assert max(num_decoded, default=0) <= 2
    assert len(num_decoded) <= 2 * len(set(token_ids)) + 1


def test_stops_are_looked_for_behind_the_least_tokens(byte_level: TextCodec) -> None:
    token_ids = byte_level.encode("a stop, a stop, the end", add_special_tokens=False)
    early = StreamDecoder(byte_level, ["stop"])
    assert "".join([early.push([each]).text for each in token_ids]) == "a "
    num_tokens = len(byte_level.encode("a stop", add_special_tokens=False))
    late = StreamDecoder(byte_level, ["stop"], min_tokens=num_tokens)
    # In runs of any length: a client that resumes brings one.
    texts = [late.push(token_ids[: num_tokens + 1]).text]
    texts += [late.push([each]).text for each in token_ids[num_tokens + 1 :]]
    assert "".join(texts) == "a stop, a " and late.stopped
