"""A sample of a request on its way through the gateway: what is known of its answer so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.services.gateway.admission import AdmittedRequest
from baton.services.gateway.shared_prompt import Beside, SharedPrompt
from baton.shared.kv.sequence import FinishReason


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
    def num_left(self) -> int:
        """Tokens that may still be generated."""
        return self.admitted.params.max_tokens - len(self.token_ids)
