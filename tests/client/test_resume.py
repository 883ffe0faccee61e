"""Breaks that the reader does not see, and those that it must."""

from __future__ import annotations

import grpc
import pytest
from baton_client import (
    DeadlineExceeded,
    InvalidRequest,
    RetryPolicy,
    ServerError,
    Unavailable,
    Unsupported,
)

from baton.shared.rpc.errors import Draining, EngineFailure, InvalidField, NoTokenizer, WorkerLost
from tests.client.asking import FAST, Asker, Outcome
from tests.client.scripted import (
    NUM_PROMPT_TOKENS,
    SEED,
    TOKEN_IDS,
    WHOLE_TEXT,
    Ending,
    ScriptedGateway,
    Try,
    aborts,
    ends_early,
    fails,
    hangs,
)

PASSING: dict[str, Ending] = {
    "connection": aborts(grpc.StatusCode.UNAVAILABLE),
    "drain": fails(Draining("the gateway is shutting down")),
    "worker": fails(WorkerLost("the worker is gone")),
    "cancel": aborts(grpc.StatusCode.CANCELLED),
    "early end": ends_early,
}


def assert_whole(outcome: Outcome, *, num_resumes: int) -> None:
    assert outcome.error is None
    assert outcome.token_ids == TOKEN_IDS
    assert outcome.text == WHOLE_TEXT
    assert [t for chunk in outcome.chunks for t in chunk.token_ids] == list(TOKEN_IDS)
    answer = outcome.answer
    assert answer is not None
    assert (answer.text, answer.token_ids, answer.seed) == (WHOLE_TEXT, TOKEN_IDS, SEED)
    assert (answer.finish_reason, answer.num_attempts) == ("length", 2)
    assert (answer.prefill_worker_id, answer.decode_worker_id) == ("p0", "d0")
    assert answer.usage.num_prompt_tokens == NUM_PROMPT_TOKENS
    assert (answer.usage.num_completion_tokens, answer.usage.num_cached_tokens) == (12, 4)
    assert (answer.timing.ttft_s, answer.timing.e2e_s) == (1.5, 2.25)
    assert (answer.timing.tpot_s, answer.timing.transfer_s) == (None, None)
    assert answer.num_resumes == num_resumes


def test_whole_answer(asker: Asker) -> None:
    with ScriptedGateway() as gateway:
        outcome = asker.generate(
            gateway.address,
            token_ids=[3, 4],
            max_tokens=12,
            temperature=0.5,
            top_p=0.75,
            top_k=9,
            min_p=0.25,
            stops=["\n", "end"],
            stop_token_ids=[7],
            ignore_eos=True,
        )
        [request] = gateway.requests
    assert_whole(outcome, num_resumes=0)
    assert list(request.token_ids.token_ids) == [3, 4]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (12, 0.5, 0.75)
    assert (sampling.top_k, sampling.min_p, sampling.ignore_eos) == (9, 0.25, True)
    assert (list(sampling.stops), list(sampling.stop_token_ids)) == (["\n", "end"], [7])
    assert not sampling.HasField("seed") and not request.received_token_ids


def test_a_chat_goes_on_as_what_it_was(asker: Asker) -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": ""}]
    with ScriptedGateway(Try(4, PASSING["connection"]), Try()) as gateway:
        assert_whole(asker.generate(gateway.address, messages=messages), num_resumes=1)
        for request in gateway.requests:
            assert request.WhichOneof("prompt") == "messages"
            sent = request.messages.messages
            assert [(each.role, each.content) for each in sent] == [("system", "be"), ("user", "")]


@pytest.mark.parametrize("name", PASSING)
def test_goes_on_after_any_token(asker: Asker, name: str) -> None:
    for upto in range(len(TOKEN_IDS) + 1):
        with ScriptedGateway(Try(upto, PASSING[name]), Try()) as gateway:
            outcome = asker.generate(gateway.address, prompt="x", temperature=0.5)
            first, second = gateway.requests
        assert_whole(outcome, num_resumes=min(upto, 1))
        assert second.sampling.seed == SEED
        assert tuple(second.received_token_ids) == TOKEN_IDS[:upto]
        assert (second.text, second.sampling.temperature) == (first.text, 0.5) == ("x", 0.5)


def test_asks_anew_when_nothing_came(asker: Asker) -> None:
    nothing = Try(0, PASSING["connection"], started=False)
    with ScriptedGateway(nothing, nothing, Try()) as gateway:
        assert_whole(asker.generate(gateway.address), num_resumes=0)
        assert [request.sampling.HasField("seed") for request in gateway.requests] == [False] * 3


def test_goes_on_from_what_the_caller_has(asker: Asker) -> None:
    with ScriptedGateway(Try(8, PASSING["connection"]), Try()) as gateway:
        outcome = asker.generate(
            gateway.address, prompt="x", seed=SEED, received_token_ids=TOKEN_IDS[:6]
        )
        asked_with = [tuple(request.received_token_ids) for request in gateway.requests]
    assert outcome.token_ids == TOKEN_IDS
    assert outcome.text == WHOLE_TEXT.removeprefix(" 100 101 102 103 104")
    assert asked_with == [TOKEN_IDS[:6], TOKEN_IDS[:8]]


def test_tries_are_bounded(asker: Asker) -> None:
    with ScriptedGateway(Try(5, PASSING["connection"])) as gateway:
        outcome = asker.generate(gateway.address)
        # One that brought tokens, and max_tries without any.
        assert len(gateway.requests) == 1 + FAST.max_tries - 1
    assert isinstance(outcome.error, Unavailable)
    assert outcome.token_ids == TOKEN_IDS[:5] and outcome.text == " 100 101 102 103"


def test_each_token_renews_the_tries(asker: Asker) -> None:
    breaks = [Try(upto, PASSING["connection"]) for upto in (*range(1, 12), 11, 11)]
    with ScriptedGateway(*breaks, Try()) as gateway:
        assert_whole(asker.generate(gateway.address), num_resumes=11)
        assert len(gateway.requests) == 14


def test_no_retry_when_told_so(asker: Asker) -> None:
    with ScriptedGateway(Try(2, PASSING["connection"])) as gateway:
        outcome = asker.generate(gateway.address, {"retry": RetryPolicy(max_tries=1)})
        assert len(gateway.requests) == 1
    assert isinstance(outcome.error, Unavailable) and outcome.token_ids == TOKEN_IDS[:2]


def test_what_stays_wrong_is_not_tried_again(asker: Asker) -> None:
    endings = {
        fails(InvalidField("sampling.top_p", "is 2", limit="0 to 1")): InvalidRequest,
        fails(NoTokenizer("the model has no tokenizer")): Unsupported,
        fails(EngineFailure("the engine failed")): ServerError,
        aborts(grpc.StatusCode.RESOURCE_EXHAUSTED): ServerError,
        aborts(grpc.StatusCode.UNKNOWN): ServerError,
    }
    for ending, kind in endings.items():
        with ScriptedGateway(Try(0, ending)) as gateway:
            outcome = asker.generate(gateway.address)
            assert len(gateway.requests) == 1
        assert type(outcome.error) is kind
        if isinstance(outcome.error, InvalidRequest):
            assert outcome.error.reason == "BAD_FIELD"
            assert outcome.error.field == "sampling.top_p"
            assert outcome.error.limit == "0 to 1"
            assert str(outcome.error).startswith("INVALID_ARGUMENT: sampling.top_p is 2")


def test_deadline_covers_the_whole_answer(asker: Asker) -> None:
    with ScriptedGateway(Try(3, PASSING["connection"]), Try(4, hangs)) as gateway:
        outcome = asker.generate(gateway.address, prompt="x", deadline_s=2.0)
        assert gateway.let_go.wait(60)
    assert isinstance(outcome.error, DeadlineExceeded)
    assert outcome.token_ids == TOKEN_IDS[:4]


def test_no_wait_beyond_the_deadline(asker: Asker) -> None:
    """The caller hears at once, and of the cause."""
    slow = {"retry": RetryPolicy(first_backoff_s=1000, max_backoff_s=1000)}
    with ScriptedGateway(Try(3, PASSING["connection"])) as gateway:
        outcome = asker.generate(gateway.address, slow, prompt="x", deadline_s=60.0)
    assert isinstance(outcome.error, Unavailable)


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        (Try(shift=1), "token 6 came where 5 is the next"),
        (Try(shift=-1), "token 4 came where 5 is the next"),
        (Try(num_prompt_tokens=6), "another model answers"),
        (Try(model_digest="b"), "another model answers"),
        (Try(seed=2), "another seed"),
    ],
)
def test_rest_that_does_not_fit_is_refused(asker: Asker, rest: Try, complaint: str) -> None:
    first = Try(5, PASSING["connection"], model_digest="a")
    with ScriptedGateway(first, rest) as gateway:
        outcome = asker.generate(gateway.address)
        assert len(gateway.requests) == 2
    assert isinstance(outcome.error, ServerError) and complaint in outcome.error.message
    assert outcome.token_ids == TOKEN_IDS[:5]


@pytest.mark.parametrize(
    ("num_before", "digests"), [(5, ("a", "a")), (5, ("", "a")), (5, ("a", "")), (0, ("a", "b"))]
)
def test_the_same_model_or_one_that_is_not_told_goes_on(
    asker: Asker, num_before: int, digests: tuple[str, str]
) -> None:
    """So does another as long as no token has come."""
    first = Try(num_before, PASSING["connection"], model_digest=digests[0])
    with ScriptedGateway(first, Try(model_digest=digests[1])) as gateway:
        outcome = asker.generate(gateway.address)
    assert outcome.error is None and outcome.token_ids == TOKEN_IDS
