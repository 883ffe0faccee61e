"""`baton status`: what workers guessed, in words and as JSON."""

from __future__ import annotations

import json

from baton.services.launcher.status import to_json, to_text
from baton.v1 import inference_service_pb2 as pb


def test_how_far_drafts_went() -> None:
    info = pb.GetServerInfoResponse()
    assert "drafts: none" in to_text(to_json(info)).splitlines()
    # Nothing was checked yet of what is guessed.
    worker = info.workers.add(drafter="draft-model:3 of demo-draft")
    worker.worker.worker_id = "decode-0"
    lines = to_text(to_json(info)).splitlines()
    assert "decode-0 guesses by draft-model:3 of demo-draft" in lines
    assert "drafts: none checked yet" in lines
    counters = info.counters
    counters.num_drafts, counters.num_drafted_tokens, counters.num_accepted_tokens = 10, 24, 9
    counters.num_accepted_by_position.extend([6, 3, 0])
    counters.num_captured_prompt_steps, counters.num_launched_prompt_steps = 70, 2
    state = to_json(info)
    lines = to_text(state).splitlines()
    assert "drafts: 1.90 tokens a step on average; accepted by position 60%, 30%, 0%" in lines
    assert [line.split() for line in lines if "drafted" in line] == [["drafted", "tokens", "24"]]
    steps = [line.split() for line in lines if "prompt steps" in line]
    assert steps == [["captured", "prompt", "steps", "70"], ["launched", "prompt", "steps", "2"]]
    assert json.loads(json.dumps(state))["counters"]["num_accepted_by_position"] == [6, 3, 0]
