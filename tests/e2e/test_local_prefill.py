"""A `both` worker beside a prefill worker: it decodes, and computes what the other cannot soon."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle
from tests.e2e.test_split_equals_together import prompt_of

pytestmark = pytest.mark.e2e


def test_a_burst_spills_over_and_the_next_prompt_does_not(
    tiny_model: Path, tmp_path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_LOCAL_PREFILL_TOKENS", "300")
    monkeypatch.setenv("BATON_LOCAL_PREFILL_SHARE", "0.5")
    roles = {"p0": "prefill", "b0": "both"}
    asks = [Ask(prompt_of(128, f"burst {n}"), {"max_tokens": 20}) for n in range(12)]
    expected = oracle.answers(asks)
    with Stack(tiny_model, tmp_path, roles, failpoints={"p0": "slow_steps"}) as stack:
        results = stack.generate_at_once([(ask.prompt, ask.sampling) for ask in asks])
        assert [result.token_ids for result in results] == expected
        assert [result.attempts for result in results] == [1] * len(asks)
        assert {result.finished.decode_worker_id for result in results} == {"b0"}
        assert {result.finished.prefill_worker_id for result in results} == {"p0", ""}

        # What was given up counts no more than what was answered.
        streams = [stack.start(prompt_of(128, f"given up {n}"), max_tokens=50) for n in range(8)]
        for stream in streams:
            next(stream)
            stream.cancel()  # type: ignore[attr-defined]
        stack.assert_idle()
        after = stack.generate(prompt_of(128, "after"), max_tokens=2)
        assert after.finished.prefill_worker_id == "p0"
        stack.assert_idle()
