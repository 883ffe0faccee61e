"""What an answer should be: the plain loop over the same model, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from baton.shared.engine.batch import Batch, BatchRow, WantedLogprobs
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.drawn import TokenLogprobs
from baton.shared.sampling import SamplingParams
from tests.device import ENGINE, ON_GPU


@dataclass(frozen=True)
class Ask:
    """One request: a prompt and its sampling fields, greedy unless they say otherwise."""

    prompt: list[int]
    sampling: dict[str, Any] = field(default_factory=dict)
    sample: int = 0
    """Which of the prompt's samples."""


class Oracle:
    def __init__(self, model: Path, **how: Any) -> None:
        """`how`: further fields of EngineConfig."""
        # As the workers: the number of threads is part of what the bits depend on.
        torch.set_num_threads(1)
        self._runner = ModelRunner(
            EngineConfig(model_dir=model, num_blocks=1024, **{**ENGINE, **how})
        )
        assert ON_GPU or self._runner.determinism == "exact"
        self._loop = PlainLoop(self._runner)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._runner.model_config.eos_token_ids

    def answer(self, ask: Ask) -> list[int]:
        [token_ids] = self.answers_of_batch([ask])
        return token_ids

    def told(self, ask: Ask) -> tuple[list[TokenLogprobs | None], list[TokenLogprobs | None]]:
        """Logprobs of the prompt, computed at once, and of its answer."""
        prompt, params = ask.prompt, _params(ask)
        answer = self.answer(ask)
        blocks = list(range(-(-(len(prompt) + len(answer)) // 16)))
        wanted = WantedLogprobs(0, prompt[1:], params.prompt_logprobs or 0)
        rows = [BatchRow(prompt, 0, [blocks], params, prompt_logprobs=wanted)]
        rows += [
            BatchRow([token_id], position, [blocks], params)
            for position, token_id in enumerate(answer[:-1], len(prompt))
        ]
        steps = [self._runner.launch(Batch([row])) for row in rows]
        drawn = [each for step in steps for each in step.result()[0]]
        assert [each.token_id for each in drawn] == answer
        return list(steps[0].prompt_logprobs(0)), [each.logprobs for each in drawn]

    def answers(self, asks: Sequence[Ask]) -> list[list[int]]:
        return [self.answer(ask) for ask in asks]

    def answers_of_batch(self, asks: Sequence[Ask]) -> list[list[int]]:
        """All prompts in one running batch; no more than the pool holds."""
        return self._loop.generate(
            [ask.prompt for ask in asks],
            [_params(ask) for ask in asks],
            samples=[ask.sample for ask in asks],
        )


def _params(ask: Ask) -> SamplingParams:
    fields = {"temperature": 0.0, "ignore_eos": True, **ask.sampling}
    for name in ("stop_token_ids", "allowed_token_ids"):
        fields[name] = frozenset(fields.get(name, ()))
    fields["logit_bias"] = tuple(sorted(fields.get("logit_bias", {}).items()))
    return SamplingParams(**fields)
