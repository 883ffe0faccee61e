"""What one attempt leaves to the next."""

from __future__ import annotations

import pytest

from baton.services.gateway.links import Events, Failed, Token
from baton.shared.kv.sequence import FinishReason, Sequence
from baton.shared.rpc.errors import Preempted
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from tests.unit.gateway.whole_gateway import whole_gateway

PROMPT = (4, 5, 6)
RECEIVED = (10, 11)
DRAWN = (12, 13, 14)


async def test_an_engine_can_tell_the_prompt_from_what_attempts_before_emitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one_after_the_other(sequence: Sequence, events: Events) -> None:
        """A token each attempt, which then fails, until the last one."""
        index = sequence.first_index
        token_id = DRAWN[index - len(RECEIVED)]
        is_last = token_id == DRAWN[-1]
        events.put_nowait(Token(index, token_id, FinishReason.LENGTH if is_last else None))
        if not is_last:
            events.put_nowait(Failed(Preempted("no free block"), None))

    async with whole_gateway(monkeypatch) as gateway:
        gateway.script = one_after_the_other
        sampling = types_pb2.SamplingParams(max_tokens=5, seed=1)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(token_ids=PROMPT), sampling=sampling, received_token_ids=RECEIVED
        )
        *_, finished = await gateway.ask_grpc(request)
        assert finished.finished.num_attempts == 3
        attempts = [sequence for _, sequence in gateway.started]
        assert [each.client_prompt_token_ids for each in attempts] == [PROMPT] * 3
        emitted = [each.emitted_token_ids for each in attempts]
        assert emitted == [RECEIVED, (*RECEIVED, 12), (*RECEIVED, 12, 13)]
