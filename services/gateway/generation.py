"""A request on its way through the gateway: what is known of its answer so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.services.gateway.admission import AdmittedRequest
from baton.shared.kv.sequence import FinishReason


@dataclass(slots=True)
class Generation:
    request_id: str
    admitted: AdmittedRequest
    deadline: float | None
    """Seconds on the monotonic clock."""
    arrived_at: float
    token_ids: list[int] = field(default_factory=list)
    """Generated so far, those that the client brought included."""
    finish_reason: FinishReason | None = None
    num_attempts: int = 0
    num_fruitless: int = 0
    """Attempts in a row that brought no token."""
    distrust: bool = False
    capability_hash: str | None = None
    model_digest: str | None = None
    """Both of the workers that its tokens came from."""
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

    @property
    def num_new(self) -> int:
        """Tokens beyond those that the client brought."""
        return len(self.token_ids) - len(self.admitted.received)

    @property
    def num_left(self) -> int:
        """Tokens that may still be generated."""
        return self.admitted.params.max_tokens - len(self.token_ids)
