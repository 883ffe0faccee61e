"""A request's answers while they arrive: what came, what is asked next, what does not fit. No I/O.

After a stream broke, the rest is asked for with the seed of the first message and the tokens that
came. The text goes on as well: what the gateway has given out after k tokens depends on these k
tokens alone, also where it holds back what may become a stop string or a whole character.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from google.protobuf.duration_pb2 import Duration

from baton_client.errors import Unsupported, misfit
from baton_client.v1 import inference_service_pb2 as pb
from baton_client.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model held a token: natural logarithms of probabilities, of its own logits."""

    logprob: float
    rank: int
    """1 for the likeliest."""
    top: tuple[tuple[int, float], ...]
    """(token id, logprob) of the likeliest in its place, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens, and the text that they made certain."""

    token_ids: tuple[int, ...]
    """Empty in the last chunk when only text that was held back is left."""
    text: str
    """May lag behind the tokens; always empty when the model has no tokenizer."""
    sample: int = 0
    """Whose they are, of the `n` that were asked for."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of each of them, if `logprobs` was given."""


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    """Prompt tokens found in a cache. After a resume: by the request that brought the rest."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds by the gateway's clock; after a resume, of the request that brought the rest."""

    ttft_s: float | None
    """To the first token; None when that request brought none."""
    tpot_s: float | None
    """Mean of each further token; None for fewer than two."""
    e2e_s: float
    transfer_s: float | None
    """What the hand-off between workers took after the prompt was computed; None without one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: one of the `n` that were asked for."""

    text: str | None
    """None when the model has no tokenizer. When `received_token_ids` were given, the rest."""
    token_ids: tuple[int, ...]
    """`received_token_ids` included."""
    finish_reason: str
    """`stop`: a stop string or token, or the model's end; `length`: `max_tokens`."""
    usage: Usage
    timing: Timing
    num_attempts: int
    """The cluster's, for the request that brought the last token; 1 when nothing went wrong."""
    num_resumes: int
    """How often this client asked again after tokens had come."""
    request_id: str
    """The server's, of the last request."""
    seed: int
    prefill_worker_id: str
    decode_worker_id: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the tokens without those that were received before, if `logprobs` was given."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the prompt from its second token on, if `prompt_logprobs` was given."""


@dataclass(slots=True)
class _Sample:
    """What came of one of the answers."""

    token_ids: list[int]
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: pb.GenerateFinished | None = None


class Progress:
    """Takes a stream's messages, and says how to go on when it breaks."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = request
        self._started: pb.GenerateStarted | None = None
        self._is_single = request.n <= 1 and not request.received_samples
        received = [each.token_ids for each in request.received_samples]
        self._samples = [
            _Sample(list(token_ids)) for token_ids in received or [request.received_token_ids]
        ]
        """Those that the request names, until the server has taken it."""
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_tokens_asked_with = self._num_tokens
        self.num_resumes = 0

    @property
    def is_finished(self) -> bool:
        return all(sample.finished is not None for sample in self._samples)

    @property
    def token_ids(self) -> list[tuple[int, ...]]:
        """By sample: all that came."""
        return [tuple(sample.token_ids) for sample in self._samples]

    @property
    def _num_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self._samples)

    @property
    def started(self) -> pb.GenerateStarted | None:
        """The first message, of the last request; None before."""
        return self._started

    def next_request(self) -> pb.GenerateRequest:
        """First the whole request; then one for the rest of its answer."""
        if self._started is None:
            return self._request
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        request.sampling.seed = self._started.seed
        del request.received_token_ids[:]
        del request.received_samples[:]
        if self._is_single:
            request.received_token_ids.extend(self._samples[0].token_ids)
        else:
            for sample in self._samples:
                request.received_samples.add(token_ids=sample.token_ids)
        if self._num_tokens > self._num_tokens_asked_with:
            self.num_resumes += 1
            self._num_tokens_asked_with = self._num_tokens
        return request

    def take(self, message: pb.GenerateResponse) -> Chunk | None:
        """The part of a message that the reader gets. Raises ServerError for one that does not
        fit."""
        match message.WhichOneof("message"):
            case "started":
                self._start(message.started)
            case "prompt_logprobs":
                self._add_of_prompt(message.prompt_logprobs)
            case "chunk":
                return self._add(message.chunk)
            case "finished":
                return self._finish(message.finished)
        return None

    def answers(self) -> list[Answer]:
        """By sample: the whole answers, once `is_finished`."""
        return [self._answer(sample) for sample in self._samples]

    def _answer(self, sample: _Sample) -> Answer:
        finished, started = sample.finished, self._started
        if finished is None or started is None:
            raise misfit("the answer ended before it started")
        usage, timing = finished.usage, finished.timing
        return Answer(
            text="".join(sample.texts) if finished.HasField("text") else None,
            token_ids=tuple(sample.token_ids),
            finish_reason=_finish_reason(finished.finish_reason),
            usage=Usage(
                usage.num_prompt_tokens, usage.num_completion_tokens, usage.num_cached_tokens
            ),
            timing=Timing(
                ttft_s=_seconds(timing.HasField, timing.ttft_time, "ttft_time"),
                tpot_s=_seconds(timing.HasField, timing.tpot_time, "tpot_time"),
                e2e_s=_seconds(timing.HasField, timing.e2e_time, "e2e_time") or 0.0,
                transfer_s=_seconds(timing.HasField, timing.transfer_time, "transfer_time"),
            ),
            num_attempts=finished.num_attempts,
            num_resumes=self.num_resumes,
            request_id=started.request_id,
            seed=started.seed,
            prefill_worker_id=finished.prefill_worker_id,
            decode_worker_id=finished.decode_worker_id,
            logprobs=tuple(sample.logprobs),
            prompt_logprobs=tuple(self._prompt_logprobs),
        )

    def _start(self, started: pb.GenerateStarted) -> None:
        before = self._started
        if before is not None and before.num_prompt_tokens != started.num_prompt_tokens:
            raise misfit(
                f"the prompt had {before.num_prompt_tokens} tokens and has "
                f"{started.num_prompt_tokens} now: another model answers"
            )
        if self._num_tokens and _are_others(before, started):
            raise misfit("another model answers than the one that these tokens came from")
        if before is not None and before.seed != started.seed:
            raise misfit("the rest of the answer would be drawn with another seed")
        self._started = started
        while len(self._samples) < self._request.n:
            self._samples.append(_Sample([]))

    def _add(self, chunk: pb.GenerateChunk) -> Chunk:
        sample = self._sample(chunk.sample)
        if sample.finished is not None:
            raise misfit(f"tokens came of sample {chunk.sample}, which had ended")
        if chunk.first_index != len(sample.token_ids):
            raise misfit(
                f"token {chunk.first_index} came where {len(sample.token_ids)} is the next"
            )
        sample.token_ids += chunk.token_ids
        sample.texts.append(chunk.text)
        logprobs = tuple(map(_logprobs, chunk.logprobs))
        sample.logprobs += logprobs
        return Chunk(tuple(chunk.token_ids), chunk.text, chunk.sample, logprobs)

    def _add_of_prompt(self, told: types_pb2.PromptLogprobs) -> None:
        """After a break before the first token all of them come again."""
        num_known = len(self._prompt_logprobs) + 1 - told.first_position
        if num_known < 0:
            raise misfit(f"logprobs of the prompt came from token {told.first_position} on")
        self._prompt_logprobs += map(_logprobs, told.tokens[num_known:])

    def _finish(self, finished: pb.GenerateFinished) -> Chunk | None:
        sample = self._sample(finished.sample)
        if sample.finished is not None:
            # After a break the server ends once more what had ended before it.
            return None
        sample.finished = finished
        if not finished.text:
            return None
        sample.texts.append(finished.text)
        return Chunk((), finished.text, finished.sample)

    def _sample(self, number: int) -> _Sample:
        if number >= len(self._samples):
            raise misfit(f"sample {number} came, of {len(self._samples)} that were asked for")
        return self._samples[number]


def _logprobs(told: types_pb2.TokenLogprobs) -> TokenLogprobs:
    top = zip(told.top_token_ids, told.top_logprobs, strict=False)
    return TokenLogprobs(told.logprob, told.rank, tuple(top))


def _are_others(before: pb.GenerateStarted | None, now: pb.GenerateStarted) -> bool:
    """A gateway may not know its model yet."""
    digests = {now.model_digest, before.model_digest if before is not None else ""}
    return len(digests - {""}) > 1


def text_of(answer: Answer) -> str:
    """Raises Unsupported when there is none."""
    if answer.text is None:
        raise Unsupported(
            "the model has no tokenizer: the answer is in token_ids",
            code=grpc.StatusCode.UNIMPLEMENTED,
            reason="NO_TOKENIZER",
        )
    return answer.text


def _finish_reason(reason: types_pb2.FinishReason) -> str:
    try:
        name = types_pb2.FinishReason.Name(reason)
    except ValueError:  # of a newer server
        return str(int(reason))
    return name.removeprefix("FINISH_REASON_").lower()


def _seconds(has_field: Callable[[str], bool], duration: Duration, name: str) -> float | None:
    return duration.seconds + duration.nanos / 1e9 if has_field(name) else None
