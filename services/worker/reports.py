"""What the engine tells others: collected during a step, delivered once at its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq

from baton.services.worker.handoff import Pull
from baton.services.worker.messages import (
    LedgerEnd,
    LedgerWrite,
    Outgoing,
    Peer,
    ToGateway,
    ToPrefillStream,
)
from baton.services.worker.sequence_table import Recipient, SequenceTable
from baton.shared.directory.ledger import LedgerEntry, Stage
from baton.shared.kv.drawn import Drawn, TokenLogprobs
from baton.shared.kv.sequence import AttemptKey, FinishReason, Sequence
from baton.shared.rpc.convert import FINISH_REASON_TO_PB, duration_to_pb, key_to_pb, logprobs_to_pb
from baton.shared.rpc.errors import BatonError, to_failure
from baton.v1 import decode_service_pb2 as dec
from baton.v1 import prefill_service_pb2 as pre
from baton.v1 import types_pb2

_MOST_IN_A_MESSAGE = 1024
"""Tokens of a prompt whose logprobs go together: a few hundred kilobytes at most."""


class Reports:
    def __init__(
        self,
        identity: Peer,
        table: SequenceTable,
        deliver: Callable[[list[Outgoing]], None],
    ) -> None:
        self._identity = identity
        self._table = table
        self._deliver = deliver
        self._outbox: list[Outgoing] = []
        self._tokens: defaultdict[str, list[tuple[int, int, Drawn, FinishReason | None]]]
        """By gateway: number, index, token id, and why it is the last."""
        self._tokens = defaultdict(list)
        self._prompt_logprobs: defaultdict[AttemptKey, list[types_pb2.PromptLogprobs]]
        self._prompt_logprobs = defaultdict(list)
        self._predictions: defaultdict[str, list[dec.CheckedPrediction]] = defaultdict(list)
        """By gateway."""
        self._joined: defaultdict[str, list[dec.SequenceJoined]] = defaultdict(list)
        """By gateway, as well."""

    def emit(self, message: Outgoing) -> None:
        self._outbox.append(message)

    def flush(self, step: int) -> None:
        """Delivers; all tokens of a gateway go as one message with columns."""
        for gateway, tokens in self._tokens.items():
            numbers, indices, drawn, reasons = zip(*tokens, strict=True)
            response = dec.DecodeResponse()
            output = response.step
            output.step = step
            output.slots.extend(numbers)
            output.indices.extend(indices)
            output.token_ids.extend([each.token_id for each in drawn])
            output.finish_reasons.extend([FINISH_REASON_TO_PB[reason] for reason in reasons])
            output.predictions.extend(self._predictions.pop(gateway, ()))
            output.joined.extend(self._joined.pop(gateway, ()))
            for column, each in enumerate(drawn):
                if each.logprobs is not None:
                    told = logprobs_to_pb(each.logprobs)
                    output.logprobs.add(column=column, logprobs=told)
            self.emit(ToGateway(gateway, response))
        self._tokens.clear()
        self._predictions.clear()
        self._joined.clear()
        if self._outbox:
            self._deliver(self._outbox[:])
            self._outbox.clear()

    # To a Prefill call

    def prompt_admitted(self, sequence: Sequence) -> None:
        admitted = pre.PrefillAdmitted(num_cached_tokens=sequence.num_cached_tokens)
        self.emit(ToPrefillStream(sequence.key, pre.PrefillResponse(admitted=admitted)))

    def first_token(
        self, sequence: Sequence, drawn: Drawn, finish_reason: FinishReason | None
    ) -> None:
        first = pre.PrefillFirstToken(
            token_id=drawn.token_id, finish_reason=FINISH_REASON_TO_PB[finish_reason]
        )
        if drawn.logprobs is not None:
            first.logprobs.CopyFrom(logprobs_to_pb(drawn.logprobs))
        self.emit(ToPrefillStream(sequence.key, pre.PrefillResponse(first_token=first)))

    # Of prompts, to whoever hosts them

    def keep_prompt_logprobs(
        self, sequence: Sequence, first_position: int, told: Seq[TokenLogprobs]
    ) -> None:
        """They leave with the first token: only then it is known that what they were computed from
        is what it should be."""
        for start in range(0, len(told), _MOST_IN_A_MESSAGE):
            tokens = map(logprobs_to_pb, told[start : start + _MOST_IN_A_MESSAGE])
            message = types_pb2.PromptLogprobs(first_position=first_position + start, tokens=tokens)
            self._prompt_logprobs[sequence.key].append(message)

    def prompt_logprobs(self, sequence: Sequence, recipient: Recipient | None) -> None:
        """Before the first token; nothing where none are wanted."""
        for message in self._prompt_logprobs.pop(sequence.key, ()):
            if recipient is None:
                event = pre.PrefillResponse(prompt_logprobs=message)
                self.emit(ToPrefillStream(sequence.key, event))
            else:
                of_slot = dec.SequencePromptLogprobs(slot=recipient.number, logprobs=message)
                response = dec.DecodeResponse(prompt_logprobs=of_slot)
                self.emit(ToGateway(recipient.gateway, response))

    def forget(self, key: AttemptKey) -> None:
        """The sequence has ended: what was kept of it is not told any more."""
        self._prompt_logprobs.pop(key, None)

    # To a gateway's Decode stream

    def joined(self, sequence: Sequence, recipient: Recipient, pull: Pull | None) -> None:
        """Goes along with its first token."""
        joined = dec.SequenceJoined(
            slot=recipient.number, num_cached_tokens=sequence.num_cached_tokens
        )
        if pull is not None:
            joined.transfer_time.CopyFrom(duration_to_pb(pull.transfer_s))
            joined.num_pulled_blocks = pull.num_pulled_blocks
        self._joined[recipient.gateway].append(joined)

    def token(
        self, recipient: Recipient, index: int, drawn: Drawn, finish_reason: FinishReason | None
    ) -> None:
        self._tokens[recipient.gateway].append((recipient.number, index, drawn, finish_reason))

    def checked_prediction(
        self, recipient: Recipient, num_accepted: int, num_rejected: int
    ) -> None:
        """Goes along with the tokens that were drawn in the same step."""
        checked = dec.CheckedPrediction(
            slot=recipient.number, num_accepted=num_accepted, num_rejected=num_rejected
        )
        self._predictions[recipient.gateway].append(checked)

    def failed(self, key: AttemptKey, recipient: Recipient | None, error: BatonError) -> None:
        """To whoever hosts the sequence."""
        if recipient is None:
            self.emit(ToPrefillStream(key, error))
            return
        failed = dec.SequenceFailed(
            slot=recipient.number, key=key_to_pb(key), failure=to_failure(error)
        )
        self.emit(ToGateway(recipient.gateway, dec.DecodeResponse(failed=failed)))

    # To the ledger

    def owns(self, sequence: Sequence, stage: Stage, *, peer: str = "") -> None:
        """The blocks are this worker's."""
        owner = self._identity
        self._ledger(sequence, stage, owner.worker_id, owner.incarnation, peer)

    def takes_over(self, sequence: Sequence, source: Peer) -> None:
        """The blocks are the source's until the sequence joins here."""
        self._ledger(
            sequence,
            Stage.HANDING_OFF,
            source.worker_id,
            source.incarnation,
            self._identity.worker_id,
        )

    def _ledger(
        self, sequence: Sequence, stage: Stage, owner: str, incarnation: str, peer: str
    ) -> None:
        entry = LedgerEntry(
            request_id=sequence.key.request_id,
            sample=sequence.key.sample,
            attempt=sequence.key.attempt,
            stage=stage,
            owner_worker_id=owner,
            owner_incarnation=incarnation,
            peer_worker_id=peer,
            num_blocks=sum(len(table) - table.first_live for table in sequence.block_tables),
        )
        self.emit(LedgerWrite(entry))

    def ended(self, key: AttemptKey) -> None:
        self.emit(LedgerEnd(key))
