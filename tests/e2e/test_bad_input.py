"""What bad input gets: a status that names field and limit, and nothing allocated for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from baton.v1 import error_details_pb2, inference_service_pb2
from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle

pytestmark = pytest.mark.e2e

MAX_MODEL_LEN = 512
VOCAB_SIZE = 512
POOL_TOKENS = 64 * 16
DEMO = Path(__file__).parents[2] / "models" / "demo"


@pytest.fixture(scope="module")
def stack(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A model without tokenizer; requests are limited by the length that both workers take. Each
    takes what its own pool has room for, far less than the model knows."""
    with Stack(
        tiny_model,
        tmp_path_factory.mktemp("stack"),
        {"p0": "prefill", "d0": "decode"},
        flags=["--max-model-len", "auto"],
        worker_flags={
            "p0": ["--num-blocks", str(2 * MAX_MODEL_LEN // 16)],
            "d0": ["--num-blocks", str(MAX_MODEL_LEN // 16)],
        },
    ) as stack:
        yield stack


def test_each_worker_says_how_long_a_sequence_it_takes(stack: Stack) -> None:
    info = stack.stub.GetModelInfo(inference_service_pb2.GetModelInfoRequest())
    assert info.max_model_len == MAX_MODEL_LEN
    told = {each.worker.worker_id: each.max_model_len for each in stack.status().workers}
    assert told == {"p0": 2 * MAX_MODEL_LEN, "d0": MAX_MODEL_LEN}
    for name, length in (("p0", 2 * MAX_MODEL_LEN), ("d0", MAX_MODEL_LEN)):
        line = f"max_model_len auto: {length} of 4096 tokens, the longest sequence that"
        assert line in stack.processes[name].log.read_text()


@pytest.fixture(scope="module")
def small_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A model with tokenizer; requests are limited by the pool, far smaller than its length."""
    flags = ["--num-blocks", str(POOL_TOKENS // 16)]
    with Stack(DEMO, tmp_path_factory.mktemp("small"), {"b0": "both"}, flags=flags) as stack:
        yield stack


def status_of(stack: Stack, prompt: list[int] | str | None, **options: Any) -> grpc.RpcError:
    """How the request failed; it must fail before its first message."""
    with pytest.raises(grpc.RpcError) as caught:
        if prompt is None:
            next(stack.stub.Generate(inference_service_pb2.GenerateRequest(), timeout=10))
        else:
            next(stack.start(prompt, timeout=10, **options))
    return caught.value


def failure_in(error: grpc.RpcError) -> error_details_pb2.Failure:
    """The one typed detail in the trailers, as a client in any language would read it."""
    trailers = {datum.key: datum.value for datum in error.trailing_metadata()}
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    [detail] = status.details
    failure = error_details_pb2.Failure()
    assert detail.Unpack(failure)
    return failure


def assert_bad_field(error: grpc.RpcError, field: str, limit: str) -> None:
    """`limit`: what its text must name."""
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    failure = failure_in(error)
    assert failure.reason == error_details_pb2.FAILURE_REASON_BAD_FIELD
    assert failure.field == field
    assert limit in failure.limit
    assert field in str(error.details()) and failure.limit in str(error.details())


def assert_untouched(stack: Stack, *workers: str) -> None:
    """Not one block was taken, not one token computed since the workers started."""
    for name in workers:
        state = stack.state(name)
        assert state.num_free_blocks == state.num_blocks
        assert state.num_cached_blocks == 0
        assert (state.num_waiting, state.num_running, state.num_claims) == (0, 0, 0)
        assert state.counters.num_steps == 0
    status = stack.status()
    assert not any(count.num_entries for count in status.ledger)
    assert status.counters.num_requests == 0


BAD_FIELDS: list[tuple[str, str, Any]] = [
    # Field, what the limit names, value
    ("temperature", "0 to 100", -0.1),
    ("temperature", "0 to 100", 100.5),
    ("temperature", "0 to 100", math.nan),
    ("temperature", "0 to 100", math.inf),
    ("temperature", "0 to 100", -math.inf),
    ("top_p", "0 to 1", -0.01),
    ("top_p", "0 to 1", 1.01),
    ("top_p", "0 to 1", math.nan),
    ("top_k", str(VOCAB_SIZE), VOCAB_SIZE + 1),
    ("top_k", str(VOCAB_SIZE), 2**32 - 1),
    ("min_p", "0 to 1", -0.01),
    ("min_p", "0 to 1", 1.01),
    ("min_p", "0 to 1", math.nan),
    ("max_tokens", "at least 1", 0),
    ("max_tokens", str(MAX_MODEL_LEN), MAX_MODEL_LEN - 3),
    ("max_tokens", str(MAX_MODEL_LEN), 2**32 - 1),
    ("stop_token_ids", "64", [3] * 65),
    ("stop_token_ids[1]", str(VOCAB_SIZE), [3, VOCAB_SIZE]),
]


def test_bad_fields_name_field_and_limit(stack: Stack) -> None:
    for field, limit, value in BAD_FIELDS:
        error = status_of(stack, [5, 6, 7, 8], **{field.partition("[")[0]: value})
        assert_bad_field(error, f"sampling.{field}", limit)
    assert_untouched(stack, "p0", "d0")


def test_bad_prompts_name_field_and_limit(stack: Stack) -> None:
    assert_bad_field(status_of(stack, None), "prompt", "text, token_ids or messages")
    assert_bad_field(status_of(stack, []), "token_ids", "at least 1")
    error = status_of(stack, [5, 6, 7, VOCAB_SIZE])
    assert_bad_field(error, "token_ids[3]", str(VOCAB_SIZE))
    assert_bad_field(status_of(stack, [2**32 - 1]), "token_ids[0]", str(VOCAB_SIZE))
    assert_bad_field(status_of(stack, [5] * MAX_MODEL_LEN), "token_ids", str(MAX_MODEL_LEN))
    assert_bad_field(status_of(stack, [5] * 100_000), "token_ids", str(MAX_MODEL_LEN))
    assert_untouched(stack, "p0", "d0")


def test_bad_resumption_names_field_and_limit(stack: Stack) -> None:
    error = status_of(stack, [5], received=[6] * 9, max_tokens=8)
    assert_bad_field(error, "received_token_ids", "8")
    error = status_of(stack, [5], received=[6, VOCAB_SIZE])
    assert_bad_field(error, "received_token_ids[1]", str(VOCAB_SIZE))
    error = status_of(stack, [5], received=[6], temperature=1.0)
    assert_bad_field(error, "sampling.seed", "seed")
    assert_untouched(stack, "p0", "d0")


def test_text_without_tokenizer_is_unimplemented(stack: Stack) -> None:
    errors = [status_of(stack, "text"), status_of(stack, [5], stops=["."])]
    with pytest.raises(grpc.RpcError) as caught:
        stack.stub.Tokenize(inference_service_pb2.TokenizeRequest(text="a"), timeout=10)
    errors.append(caught.value)
    with pytest.raises(grpc.RpcError) as caught:
        stack.stub.Detokenize(inference_service_pb2.DetokenizeRequest(token_ids=[5]), timeout=10)
    errors.append(caught.value)
    for error in errors:
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert failure_in(error).reason == error_details_pb2.FAILURE_REASON_NO_TOKENIZER
    assert_untouched(stack, "p0", "d0")


def test_message_over_the_size_limit_is_resource_exhausted(stack: Stack) -> None:
    error = status_of(stack, [VOCAB_SIZE - 1] * (3 << 20))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_untouched(stack, "p0", "d0")


def test_bytes_that_are_no_message_are_refused(stack: Stack) -> None:
    with grpc.insecure_channel(stack.processes["gateway"].address) as channel:
        path = "/baton.v1.InferenceService/Generate"
        generate: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
        with pytest.raises(grpc.RpcError):
            next(generate(b"\xff" * 64, timeout=10))
    assert_untouched(stack, "p0", "d0")


def test_bad_text_names_field_and_limit(small_stack: Stack) -> None:
    assert_bad_field(status_of(small_stack, "a" * ((1 << 20) + 1)), "text", str(1 << 20))
    assert_bad_field(status_of(small_stack, "a", stops=["."] * 17), "sampling.stops", "16")
    error = status_of(small_stack, "a", stops=[".", ""])
    assert_bad_field(error, "sampling.stops[1]", "256")
    error = status_of(small_stack, "a", stops=["a" * 257])
    assert_bad_field(error, "sampling.stops[0]", "256")
    assert_untouched(small_stack, "b0")


def test_request_larger_than_the_pool_is_refused(small_stack: Stack) -> None:
    error = status_of(small_stack, [5] * 1000, max_tokens=25)
    assert_bad_field(error, "sampling.max_tokens", f"{POOL_TOKENS}, the largest block pool")
    error = status_of(small_stack, [5] * POOL_TOKENS)
    assert_bad_field(error, "token_ids", f"{POOL_TOKENS}, the largest block pool")
    error = status_of(small_stack, "word " * 4000)
    assert_bad_field(error, "text", f"{POOL_TOKENS}, the largest block pool")
    assert_untouched(small_stack, "b0")


def test_what_just_fits_is_served_after_all_that(
    stack: Stack, small_stack: Stack, oracle: Oracle
) -> None:
    """Every limit itself is still allowed, and the processes that refused so much are well."""
    ask = Ask(
        [VOCAB_SIZE - 1] * (MAX_MODEL_LEN - 4),
        {"temperature": 100.0, "top_p": 1.0, "top_k": VOCAB_SIZE, "min_p": 0.0, "max_tokens": 4},
    )
    ask.sampling.update(seed=9, stop_token_ids=[0] * 63 + [VOCAB_SIZE - 1])
    result = stack.generate(ask.prompt, **ask.sampling)
    assert result.token_ids == oracle.answer(ask)
    full = small_stack.generate([5] * 1000, max_tokens=24)
    assert len(full.token_ids) == 24
    assert full.attempts == 1
    # The answer to no text begins after the start token.
    assert small_stack.generate("", max_tokens=2).num_prompt_tokens == 1
    stack.assert_idle()
    small_stack.assert_idle()
    assert all(p.popen.poll() is None for s in (stack, small_stack) for p in s.processes.values())


def test_a_prompt_as_long_as_can_be_is_scored(stack: Stack, small_stack: Stack) -> None:
    """No answer is wanted, so none needs room: on two workers, and on one of both roles."""
    for each, length in ((stack, MAX_MODEL_LEN), (small_stack, POOL_TOKENS)):
        prompt = [5 + n % 100 for n in range(length)]
        result = each.generate(prompt, max_tokens=0, prompt_logprobs=1)
        assert (len(result.prompt_logprobs), result.token_ids) == (length - 1, [])
        shorter = each.generate(prompt[:-1], max_tokens=0, prompt_logprobs=1)
        assert shorter.prompt_logprobs == result.prompt_logprobs[:-1]
        status_of(each, [*prompt, 5], max_tokens=0, prompt_logprobs=1)
