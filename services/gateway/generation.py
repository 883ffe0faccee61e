"""A sample of a request on its way through the gateway: what is known of its answer so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.services.gateway.admission import AdmittedRequest
from baton.services.gateway.shared_prompt import Beside, SharedPrompt
from baton.shared.kv.sequence import FinishReason
from baton.v1 import types_pb2


@dataclass(slots=True)
class Generation:
    request_id: str
    admitted: AdmittedRequest
    deadline: float | None
    """Seconds on the monotonic clock."""
    arrived_at: float
    sample: int = 0
    """Which of the request's samples, from 0."""
    prompt: SharedPrompt | None = None
    """Shared with the request's other samples; None of a request that has one."""
    computes_prompt: bool = True
    """False: it waits until another sample has."""
    token_ids: list[int] = field(init=False)
    """Generated so far, those that the client brought included."""
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list)
    """Of the last of these tokens, as many as were not sent yet; of none where none are wanted."""
    prompt_logprobs: list[types_pb2.PromptLogprobs] = field(default_factory=list)
    """That came and were not sent yet. What was sent once is never computed again."""
    next_prompt_position: int = 1
    """Of the prompt's first token of which nothing came."""
    finish_reason: FinishReason | None = None
    num_attempts: int = 0
    num_fruitless: int = 0
    """Attempts in a row that brought no token."""
    distrust: bool = False
    capability_hash: str | None = None
    model_digest: str | None = None
    """Both of the workers that its tokens came from; the model is that of the other samples."""
    num_cached_tokens: int = 0
    num_accepted_prediction_tokens: int = 0
    num_rejected_prediction_tokens: int = 0
    """Of all attempts: what workers guessed by the prediction."""
    transfer_s: float | None = None
    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    routed_at: float = 0.0
    """When the first attempt had its workers."""
    prefill_admitted_at: float = 0.0
    """By the first attempt's prefill worker."""
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    def __post_init__(self) -> None:
        self.token_ids = list(self.received)

    @property
    def received(self) -> tuple[int, ...]:
        """Tokens that the client brought."""
        return self.admitted.received[self.sample]

    async def wait_for_prompt(self) -> None:
        """Until it may start: at once, or when another sample has computed the prompt."""
        if self.prompt is not None and not self.computes_prompt:
            beside = await self.prompt.computed()
            if self.admitted.params.prompt_logprobs is not None:
                await self.prompt.is_told.wait()
            self.model_digest = beside.route.decode.model_digest
            self.num_cached_tokens = beside.num_cached_tokens

    @property
    def has_begun(self) -> bool:
        """Whether its reader may have tokens of the request."""
        return bool(self.token_ids) or self.prompt is not None and self.prompt.beside is not None

    @property
    def beside(self) -> Beside | None:
        """Where another sample has left the prompt's blocks, for this one's first attempt: later
        ones go their own ways."""
        return self.prompt.beside if self.prompt is not None and self.num_attempts == 1 else None

    @property
    def num_new(self) -> int:
        """Tokens beyond those that the client brought."""
        return len(self.token_ids) - len(self.received)

    @property
    def lacks_prompt_logprobs(self) -> bool:
        admitted = self.admitted
        is_asked = self.computes_prompt and admitted.params.prompt_logprobs is not None
        return is_asked and self.next_prompt_position < len(admitted.prompt_token_ids)

    def take_prompt_logprobs(self, told: types_pb2.PromptLogprobs) -> None:
        """Of those that follow what has come; what an attempt repeats is left out."""
        num_known = self.next_prompt_position - told.first_position
        if 0 <= num_known < len(told.tokens):
            del told.tokens[:num_known]
            told.first_position = self.next_prompt_position
            self.prompt_logprobs.append(told)
            self.next_prompt_position += len(told.tokens)

    def told_of_prompt(self) -> None:
        """All that came of its logprobs was sent."""
        self.prompt_logprobs.clear()
        if self.prompt is not None:
            self.prompt.is_told.set()

    def drop_tokens(self) -> None:
        """An answer without tokens is whole."""
        self.token_ids.clear()
        self.logprobs.clear()
        self.finish_reason = FinishReason.LENGTH

    @property
    def num_left(self) -> int:
        """Tokens that may still be generated."""
        return self.admitted.params.max_tokens - len(self.token_ids)
