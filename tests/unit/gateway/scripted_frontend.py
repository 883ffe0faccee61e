"""A gateway whose workers keep to a script: everything but the attempts is real."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping

from baton.services.gateway import generate as path
from baton.services.gateway.admission import Limits, ModelDefaults
from baton.services.gateway.generation import Generation
from baton.services.gateway.identity import Identity
from baton.services.gateway.tokenizer import TextCodec
from baton.shared.kv.sequence import FinishReason
from baton.shared.telemetry import Counters
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from tests.unit.gateway.null_frontend import NullFrontend


class ScriptedFrontend(NullFrontend):
    """Token t is followed by `next_token[t]`, or by itself. `attempts` takes the place of the
    function of that name in generate.py."""

    def __init__(
        self,
        codec: TextCodec,
        next_token: Mapping[int, int],
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        default_sampling: types_pb2.SamplingParams | None = None,
        max_model_len: int = 512,
    ) -> None:
        super().__init__(codec)
        self.counters = Counters()
        self._next_token = next_token
        self.defaults = ModelDefaults(eos_token_ids, default_sampling or types_pb2.SamplingParams())
        self._limits = Limits(vocab_size=1000, max_model_len=max_model_len, max_pool_tokens=None)
        self.cluster.limits = lambda: self._limits  # type: ignore[method-assign]

    async def generate(
        self,
        request: pb.GenerateRequest,
        *,
        identity: Identity,
        time_left_s: float | None,
        shown_token_ids: Collection[int] = (),
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        self.requests.append(request)
        async for response in path.generate(
            request,
            identity=identity,
            request_id="r-1",
            deadline=None,
            cluster=self.cluster,
            codec=self.codec,
            defaults=self.defaults,
            counters=self.counters,
            metrics=self.metrics,
            shown_token_ids=shown_token_ids,
        ):
            yield response

    async def attempts(
        self, generation: Generation, *rest: object
    ) -> AsyncGenerator[list[int], None]:
        params = generation.admitted.params
        last = [*generation.admitted.prompt_token_ids, *generation.token_ids][-1]
        while generation.finish_reason is None:
            last = self._next_token.get(last, last)
            generation.token_ids.append(last)
            if last in params.stop_token_ids:
                generation.finish_reason = FinishReason.STOP
            elif len(generation.token_ids) >= params.max_tokens:
                generation.finish_reason = FinishReason.LENGTH
            yield [last]
