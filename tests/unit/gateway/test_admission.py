"""Admission: every field against its limit, and what a request becomes that keeps them all."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from baton.services.gateway.admission import AdmittedRequest, Limits, admit, chat_token_ids
from baton.shared.rpc.errors import InvalidField, NoTokenizer
from baton.shared.sampling import SamplingParams
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2

LIMITS = Limits(vocab_size=100, max_model_len=64, max_pool_tokens=640, default_max_tokens=20)


async def encode(text: str) -> Sequence[int]:
    """One token a character; blanks give none, and ~ is a token that the model lacks."""
    return [100 if character == "~" else 7 for character in text if character != " "]


async def encode_answer(text: str) -> list[int]:
    """A space with what follows is one token, and so is each other character."""
    return [ord(each[-1]) % 50 + 50 * (len(each) > 1) for each in re.findall(" ?.", text)]


def request(
    *,
    prompt: str | Sequence[int] | None = (1, 2, 3),
    received: Sequence[int] = (),
    **sampling: Any,
) -> pb.GenerateRequest:
    message = pb.GenerateRequest(
        sampling=types_pb2.SamplingParams(**sampling), received_token_ids=received
    )
    if isinstance(prompt, str):
        message.text = prompt
    elif prompt is not None:
        message.token_ids.SetInParent()
        message.token_ids.token_ids.extend(prompt)
    return message


async def admitted(message: pb.GenerateRequest, limits: Limits = LIMITS) -> AdmittedRequest:
    # Through the wire, as the server gets it: float fields are rounded to 32 bits.
    message = pb.GenerateRequest.FromString(message.SerializeToString())
    return await admit(
        message, limits, encode=encode, encode_answer=encode_answer, draw_seed=lambda: 4711
    )


async def refused(message: pb.GenerateRequest, limits: Limits = LIMITS) -> tuple[str, str]:
    with pytest.raises(InvalidField) as raised:
        await admitted(message, limits)
    return raised.value.field, raised.value.limit


async def test_unset_fields_take_their_defaults() -> None:
    assert await admitted(request()) == AdmittedRequest(
        prompt_token_ids=(1, 2, 3),
        params=SamplingParams(seed=4711, max_tokens=20),
        received=((),),
    )
    bare = pb.GenerateRequest(text="abc")
    assert (await admitted(bare)).params.temperature == 1.0


async def test_set_fields_arrive() -> None:
    message = request(
        prompt="ab c",
        received=[4, 5],
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        seed=2**64 - 1,
        max_tokens=9,
        stops=["x", "yz"],
        stop_token_ids=[8, 9, 8],
        ignore_eos=True,
    )
    params = SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        seed=2**64 - 1,
        max_tokens=9,
        stops=("x", "yz"),
        stop_token_ids=frozenset([8, 9]),
        ignore_eos=True,
    )
    assert await admitted(message) == AdmittedRequest((7, 7, 7), params, ((4, 5),))


async def test_a_seed_of_zero_is_a_seed() -> None:
    assert (await admitted(request(seed=0))).params.seed == 0


async def test_drawn_seeds_differ() -> None:
    seeds = {(await admit(request(), LIMITS, encode=None)).params.seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(
    ("field", "accepted", "broken"),
    [
        ("temperature", [0.0, -0.0, 1e-30, 100.0], [-0.01, 100.01, math.inf, -math.inf, math.nan]),
        ("top_p", [0.0, 1e-30, 0.5, 1.0], [-0.5, 1.01, math.inf, math.nan]),
        ("top_k", [0, 1, 100], [101, 2**32 - 1]),
        ("min_p", [0.0, 0.5, 1.0], [-0.01, 1.01, math.inf, -math.inf, math.nan]),
        ("max_tokens", [1, 61], [0, 62, 2**32 - 1]),
        ("stops", [["x"] * 16, ["é" * 256]], [["x"] * 17]),
        ("stop_token_ids", [[99] * 64], [[1] * 65]),
        ("presence_penalty", [-2.0, 2.0], [-2.01, 2.01, math.inf, math.nan]),
        ("frequency_penalty", [-2.0, 2.0], [-2.01, 2.01, -math.inf, math.nan]),
        ("repetition_penalty", [1e-30, 1.0, 1e30], [0.0, -0.0, -1.0, 1e-40, math.inf, math.nan]),
        ("min_tokens", [0, 20], [21, 2**32 - 1]),
        ("logit_bias", [{}, {99: 100.0, 0: -100.0}], [dict.fromkeys(range(1025), 1.0)]),
        ("allowed_token_ids", [[99], [1] * 4096], [[1] * 4097]),
        ("bad_words", [["x"] * 128, ["x" * 256]], [["x"] * 129]),
    ],
)
async def test_ranges(field: str, accepted: list[Any], broken: list[Any]) -> None:
    for value in accepted:
        await admitted(request(**{field: value}))
    for value in broken:
        named, limit = await refused(request(**{field: value}))
        assert named == f"sampling.{field}"
        assert limit


@pytest.mark.parametrize(
    ("message", "field", "limit"),
    [
        (request(prompt=None), "prompt", "text, token_ids or messages"),
        (request(prompt=""), "text", "at least 1 character"),
        (request(prompt="  "), "text", "at least 1 token"),
        (request(prompt=[]), "token_ids", "at least 1 token"),
        (request(prompt="a~b"), "text", "below 100"),
        (request(prompt=[1, 2, 99, 100]), "token_ids[3]", "below the vocabulary's size, 100"),
        (
            request(prompt=[2**32 - 1, 100]),
            "token_ids[0]",
            "below the vocabulary's size, 100",
        ),
        (
            request(received=[0, 100]),
            "received_token_ids[1]",
            "below the vocabulary's size, 100",
        ),
        (
            request(stop_token_ids=[5, 100]),
            "sampling.stop_token_ids[1]",
            "below the vocabulary's size, 100",
        ),
        (request(stops=["x", ""]), "sampling.stops[1]", "1 to 256 characters"),
        (request(stops=["x" * 257]), "sampling.stops[0]", "1 to 256 characters"),
        (
            request(logit_bias={5: 1, 100: 1}),
            "sampling.logit_bias[100]",
            "tokens below the vocabulary's size, 100",
        ),
        (request(logit_bias={5: 1, 7: -100.5}), "sampling.logit_bias[7]", "-100 to 100"),
        (request(logit_bias={7: math.nan}), "sampling.logit_bias[7]", "-100 to 100"),
        (
            request(allowed_token_ids=[5, 100]),
            "sampling.allowed_token_ids[1]",
            "below the vocabulary's size, 100",
        ),
        (request(bad_words=["x", ""]), "sampling.bad_words[1]", "1 to 256 characters"),
        (request(max_tokens=3, min_tokens=4), "sampling.min_tokens", "max_tokens, 3"),
    ],
)
async def test_elements_are_named(message: pb.GenerateRequest, field: str, limit: str) -> None:
    assert await refused(message) == (field, limit)


async def test_length_of_prompt_and_answer() -> None:
    limit = "prompt and answer together 64, the model's length"
    full = [1] * 63
    assert (await admitted(request(prompt=full))).params.max_tokens == 1
    assert (await admitted(request(prompt=full, max_tokens=1))).params.max_tokens == 1
    assert await refused(request(prompt=full, max_tokens=2)) == ("sampling.max_tokens", limit)
    assert await refused(request(prompt=[1] * 64)) == ("token_ids", limit)
    assert await refused(request(prompt="a" * 64)) == ("text", limit)
    # Who asks of the prompt alone needs no room for an answer.
    scored: dict[str, Any] = {"max_tokens": 0, "prompt_logprobs": 1}
    assert (await admitted(request(prompt=[1] * 64, **scored))).wants_no_token
    assert await refused(request(prompt=[1] * 65, **scored)) == ("token_ids", limit)


async def test_a_request_larger_than_the_whole_pool() -> None:
    limits = Limits(vocab_size=100, max_model_len=64, max_pool_tokens=32, default_max_tokens=20)
    limit = "prompt and answer together 32, the largest block pool"
    assert (await admitted(request(prompt=[1] * 12), limits)).params.max_tokens == 20
    assert (await admitted(request(prompt=[1] * 13), limits)).params.max_tokens == 19
    message = request(prompt=[1] * 13, max_tokens=20)
    assert await refused(message, limits) == ("sampling.max_tokens", limit)
    assert await refused(request(prompt=[1] * 32), limits) == ("token_ids", limit)


async def test_without_a_known_pool_the_models_length_counts() -> None:
    limits = Limits(vocab_size=100, max_model_len=64, max_pool_tokens=None)
    assert (await admitted(request(), limits)).params.max_tokens == 61


async def test_a_prompt_with_a_place_for_an_image() -> None:
    """Of a multimodal checkpoint: what is there in the place of the image would be nonsense."""
    limits = replace(LIMITS, media_tokens={7: "image_token_id", 9: "video_token_id"})
    assert (await admitted(request(prompt=[1, 8, 2]), limits)).prompt_token_ids == (1, 8, 2)
    for prompt, field in (((1, 7, 9, 7), "token_ids"), ("a picture", "text")):
        with pytest.raises(InvalidField) as raised:
            await admitted(request(prompt=prompt), limits)
        assert (raised.value.field, raised.value.limit) == (field, "text alone")
        index = 1 if field == "token_ids" else 0
        assert f"image_token_id 7 as token {index}: images, video" in raised.value.message
    # What the model itself has written is its own affair.
    assert (await admitted(request(received=[7], temperature=0.0), limits)).received == ((7,),)


async def test_a_huge_text_is_not_tokenised() -> None:
    async def never(text: str) -> Sequence[int]:
        raise AssertionError("tokenised")

    limits = Limits(vocab_size=100, max_model_len=64, max_pool_tokens=640, max_text_bytes=10)
    await admitted(request(prompt="é" * 5), limits)
    for broken in (request(prompt="é" * 5 + "e"), request(prompt="ab", top_k=101)):
        with pytest.raises(InvalidField):
            await admit(broken, limits, encode=never)


async def test_resuming() -> None:
    with_seed = request(received=[4, 5], seed=1, max_tokens=2)
    assert (await admitted(with_seed)).received == ((4, 5),)
    # A greedy answer draws nothing, so any seed will do.
    assert (await admitted(request(received=[4], temperature=0.0))).received == ((4,),)
    field, limit = await refused(request(received=[4]))
    assert (field, limit) == ("sampling.seed", "the seed that the first message told")
    too_many = request(received=[4, 5, 6], seed=1, max_tokens=2)
    assert await refused(too_many) == ("received_token_ids", "max_tokens, 2")


async def test_resuming_keeps_the_default_of_the_first_request() -> None:
    first = await admitted(request(seed=1))
    again = await admitted(request(seed=1, received=[4] * 15))
    assert again.params == first.params


async def test_without_a_tokenizer_only_token_ids_are_served() -> None:
    assert (await admit(request(), LIMITS, encode=None)).prompt_token_ids == (1, 2, 3)
    for message in (request(prompt="a"), request(stops=["x"])):
        with pytest.raises(NoTokenizer):
            await admit(message, LIMITS, encode=None)


def chat(*messages: tuple[str, str], **sampling: Any) -> pb.GenerateRequest:
    message = pb.GenerateRequest(sampling=types_pb2.SamplingParams(**sampling))
    message.messages.SetInParent()
    for role, content in messages:
        message.messages.messages.add(role=role, content=content)
    return message


async def test_a_chat_is_rendered_as_a_whole() -> None:
    async def encode_chat(messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        written = "".join(f"{each['role']}:{each['content']}" for each in messages)
        return await encode(written)

    async def admitted_chat(*messages: tuple[str, str], **sampling: Any) -> AdmittedRequest:
        message = chat(*messages, **sampling)
        return await admit(message, LIMITS, encode=None, encode_chat=encode_chat)

    assert len((await admitted_chat(("system", "a"), ("user", ""))).prompt_token_ids) == 13
    for messages, field, limit in (
        ([], "messages", "at least 1 message"),
        ([("user", "a"), ("tool", "b")], "messages[1].role", "system, user, assistant"),
        ([("user", "a~")], "messages", "below 100"),
        ([("user", 64 * "a")], "messages", "prompt and answer together 64, the model's length"),
    ):
        with pytest.raises(InvalidField) as raised:
            await admitted_chat(*messages)
        assert (raised.value.field, raised.value.limit) == (field, limit)
    with pytest.raises(InvalidField, match="top_k"):
        await admit(chat(("user", "a"), top_k=101), LIMITS, encode=None, encode_chat=None)
    with pytest.raises(NoTokenizer, match="messages need a tokenizer"):
        await admit(chat(("user", "a")), LIMITS, encode=None)


async def test_a_chat_is_bounded_before_and_after_it_is_rendered() -> None:
    class Twice:
        """Says everything twice."""

        async def render_chat_async(
            self, messages: Sequence[Mapping[str, Any]], **options: Any
        ) -> str:
            return "".join(each["content"] * 2 for each in messages)

        async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            assert not add_special_tokens
            return [7] * len(text)

    limits = Limits(vocab_size=100, max_model_len=64, max_pool_tokens=None, max_text_bytes=10)
    assert len(await chat_token_ids([{"content": "12345"}], limits, Twice())) == 10
    for content, num_bytes in (
        *(("123456", "12"), ("12345678901", "11")),
        *(("é" * 20, "40"), ("é" * 41, "at least 41")),
    ):
        with pytest.raises(InvalidField, match=f"messages has {num_bytes} bytes"):
            await chat_token_ids([{"content": content}], limits, Twice())


async def test_the_message_names_field_value_and_limit() -> None:
    with pytest.raises(InvalidField, match=r"^sampling\.temperature is 200; limit: 0 to 100$"):
        await admitted(request(temperature=200.0))


async def test_bad_words_are_banned_with_and_without_a_space() -> None:
    alone, behind_space, b = ord("a") % 50, ord("a") % 50 + 50, ord("b") % 50
    message = request(bad_words=["ab", " ab", "b", "  b"])
    assert (await admitted(message)).banned_sequences == (
        (alone, b),
        (behind_space, b),
        (b,),
        (b + 50,),
    )
    # What is nothing but spaces is banned as it is; a token that the model lacks is never drawn.
    assert (await admitted(request(bad_words=["  "]))).banned_sequences == ((82,),)
    few = dataclasses.replace(LIMITS, vocab_size=60)
    assert (await admitted(request(bad_words=["b"]), few)).banned_sequences == ((b,),)


async def test_words_without_a_token_are_refused() -> None:
    message = request(bad_words=["b", "\n"])
    assert await refused(message) == ("sampling.bad_words[1]", "texts that the tokenizer knows")


@pytest.mark.parametrize(
    "ruled_out",
    [
        {"logit_bias": {7: -100.0, 48: -100.0}},
        {"logit_bias": {7: -100.0}, "bad_words": ["b"]},
        {"min_tokens": 1, "stop_token_ids": [7, 48]},
    ],
)
async def test_what_is_allowed_must_leave_something(ruled_out: dict[str, Any]) -> None:
    message = request(allowed_token_ids=[7, ord("b") % 50], **ruled_out)
    assert await refused(message) == ("sampling.allowed_token_ids", "at least 1 such token")
    message.sampling.allowed_token_ids.append(8)
    await admitted(message)
