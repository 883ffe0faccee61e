"""What a worker tells a scrape that its engine has no time for."""

from __future__ import annotations

import queue

import pytest
from prometheus_client import CollectorRegistry

from baton.services.worker import messages as msg
from baton.services.worker import metrics
from baton.services.worker.metrics import EngineMetrics, WorkerCollector
from baton.shared.engine.executor import StepCounts
from baton.v1 import worker_service_pb2
from tests.unit.worker.conftest import MakeRunner
from tests.unit.worker.sim_worker import SimWorker


class Engine:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = EngineMetrics(self.registry)
        self.inbox: queue.SimpleQueue[msg.Command] = queue.SimpleQueue()
        collector = WorkerCollector(
            self.inbox,
            self.metrics,
            about={"model_name": "m", "worker_id": "d0"},
            path_rates=dict,
            is_directory_reachable=lambda: True,
            is_draining=lambda: False,
        )
        self.registry.register(collector)

    def answer(self, *, num_generated: int, num_joined: int) -> None:
        """To all that have asked, of one moment between two steps."""
        self.metrics.num_joined = num_joined
        state = worker_service_pb2.GetWorkerStateResponse()
        state.counters.num_generated_tokens = num_generated
        while not self.inbox.empty():
            command = self.inbox.get_nowait()
            assert isinstance(command, msg.Inspect)
            command.reply(state)

    def scraped(self) -> float | None:
        return self.registry.get_sample_value("baton_generated_tokens_total")


def test_prompt_steps_by_how_they_came_about(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the runner, to whoever looks into the worker, and from there to metrics."""
    runner = make_runner(24)
    monkeypatch.setattr(runner._executor, "num_prompt_steps", StepCounts(captured=3, launched=1))
    states: list[worker_service_pb2.GetWorkerStateResponse] = []
    worker = SimWorker("w", "ab" * 16, runner, lambda *_: None)
    worker.engine._handle(msg.Inspect(False, states.append))
    engine = Engine()
    engine.registry.get_sample_value("baton_captured_prompt_steps_total")
    command = engine.inbox.get_nowait()
    assert isinstance(command, msg.Inspect)
    command.reply(states[0])
    for kind, expected in (("captured", 3), ("launched", 1)):
        monkeypatch.setattr(metrics, "_ANSWER_S", 0.0)
        name = f"baton_{kind}_prompt_steps_total"
        assert engine.registry.get_sample_value(name) == expected


def test_counters_do_not_go_back_while_the_engine_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_ANSWER_S", 0.0)
    engine = Engine()
    engine.scraped()
    engine.answer(num_generated=5, num_joined=1)
    assert engine.scraped() == 4
    # It counts on, and has no time to say so.
    engine.metrics.num_joined = 3
    assert engine.scraped() == 4
    # What it says too late is not lost.
    engine.answer(num_generated=9, num_joined=3)
    assert engine.scraped() == 6


def test_drafts_are_told_by_our_names_and_by_vllm_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_ANSWER_S", 0.0)
    engine = Engine()
    state = worker_service_pb2.GetWorkerStateResponse(num_accepted_by_position=[6, 3, 0])
    state.counters.num_drafts, state.counters.num_drafted_tokens = 10, 24
    state.counters.num_accepted_tokens = 9
    engine.scraped()
    while not engine.inbox.empty():
        command = engine.inbox.get_nowait()
        assert isinstance(command, msg.Inspect)
        command.reply(state)
    told = engine.registry.get_sample_value
    labels = {"model_name": "m", "engine": "d0"}
    assert told("vllm:spec_decode_num_drafts_total", labels) == 10
    assert told("vllm:spec_decode_num_draft_tokens_total", labels) == 24
    assert told("vllm:spec_decode_num_accepted_tokens_total", labels) == 9
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [told(name, {**labels, "position": str(place)}) for place in range(3)] == [6, 3, 0]
    assert told("baton_accepted_tokens_by_position_total", {"position": "1"}) == 3
    assert told("baton_mean_accepted_length") == 1.9


def test_the_rate_of_prompts_is_that_of_steps_of_nothing_else() -> None:
    engine = EngineMetrics(CollectorRegistry())
    assert engine.prompt_tokens_per_s == 0
    for _ in range(200):
        engine.took_step(0.5, num_decoded_tokens=0, num_prompt_tokens=1000)
    engine.took_step(9.0, num_decoded_tokens=4, num_prompt_tokens=1000)
    engine.took_step(9.0, num_decoded_tokens=4, num_prompt_tokens=0)
    assert engine.prompt_tokens_per_s in (1999, 2000)
    for _ in range(200):
        engine.took_step(0.25, num_decoded_tokens=0, num_prompt_tokens=1000)
    assert engine.prompt_tokens_per_s in (3999, 4000), "what was long ago does not count"
