"""What the gateway tells of requests and of the cluster."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from baton.services.gateway.admission import AdmittedRequest
from baton.services.gateway.generation import Generation
from baton.services.gateway.metrics import ClusterLoad, GatewayMetrics, cluster_load
from baton.services.gateway.report import RequestReport, cause
from baton.shared.directory.workers import ModelFacts, Role, WorkerLoad, WorkerRecord
from baton.shared.kv.capability import Capability
from baton.shared.kv.capacity import Capacity, GroupShare
from baton.shared.kv.sequence import FinishReason
from baton.shared.rpc.errors import InvalidField, TooManyAttempts, WorkerLost
from baton.shared.sampling import SamplingParams


def worker(
    role: Role, *, waiting: int = 0, running: int = 0, free: int = 10, blocks: int = 10
) -> WorkerRecord:
    return WorkerRecord(
        worker_id=f"{role}-0",
        incarnation="ab",
        role=role,
        address="",
        capability=Capability("m", "float32", "float32", 16, ("layout",), "exact"),
        model=ModelFacts("m", "llama", 512, (2,)),
        capacity=Capacity(16, (blocks,), (GroupShare(0),), 4096),
        load=WorkerLoad(waiting, running, (free,), {}),
    )


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ([], ClusterLoad(0, 0, 0.0)),
        # Six prompts at a pair: three in the queue, one computed, two decoding. On the decode
        # side those that are not there yet wait.
        (
            [
                worker("prefill", waiting=3, running=1, free=5),
                worker("decode", waiting=4, running=2, free=8),
            ],
            ClusterLoad(3, 3, 0.5),
        ),
        # Computed and handed over: at the prefill worker only until the last block is pulled.
        (
            [worker("prefill", running=1), worker("decode", running=1, free=0)],
            ClusterLoad(0, 1, 1.0),
        ),
        # The decode side has no room: those that wait there are waiting.
        ([worker("prefill"), worker("decode", waiting=5, running=2)], ClusterLoad(5, 2, 0.0)),
        ([worker("both", waiting=2, running=3, free=4)], ClusterLoad(2, 3, 0.6)),
        ([worker("both", free=0, blocks=0)], ClusterLoad(0, 0, 0.0)),
    ],
)
def test_a_request_at_two_workers_counts_once(
    workers: list[WorkerRecord], expected: ClusterLoad
) -> None:
    load = cluster_load(workers)
    assert (load.num_waiting, load.num_running) == (expected.num_waiting, expected.num_running)
    assert load.cache_usage == pytest.approx(expected.cache_usage)


def statuses(metrics: GatewayMetrics) -> dict[str, float]:
    return {
        sample.labels["status"]: sample.value
        for family in metrics.requests.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }


@pytest.mark.parametrize(
    ("error", "time_left_s", "status"),
    [
        (InvalidField("text", "is bad", limit="none"), None, "INVALID_ARGUMENT"),
        (TooManyAttempts("sixteen"), None, "INTERNAL"),
        (asyncio.CancelledError(), None, "CANCELLED"),
        (GeneratorExit(), 60.0, "CANCELLED"),
        (asyncio.CancelledError(), 0.0, "DEADLINE_EXCEEDED"),
        (ZeroDivisionError(), None, "INTERNAL"),
    ],
)
def test_each_request_ends_with_one_status(
    error: BaseException, time_left_s: float | None, status: str
) -> None:
    metrics, now = GatewayMetrics("m"), time.monotonic()
    deadline = None if time_left_s is None else now + time_left_s
    with pytest.raises(type(error)), RequestReport("r-1", now, deadline, metrics):
        raise error
    assert statuses(metrics) == {status: 1}


def test_an_answer_that_nobody_reads_to_its_end_was_still_given(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics, now = GatewayMetrics("m"), time.monotonic()
    admitted = AdmittedRequest((5, 6, 7), SamplingParams(max_tokens=2), ((),))
    generation = Generation("r-1", admitted, None, now)
    generation.finish_reason = FinishReason.LENGTH
    caplog.set_level(logging.INFO)
    with pytest.raises(GeneratorExit), RequestReport("r-1", now, None, metrics) as report:
        report.admitted([generation])
        for token in (8, 9):
            generation.token_ids.append(token)
            generation.last_token_at = time.monotonic()
            generation.first_token_at = generation.first_token_at or generation.last_token_at
            report.tokens_came(generation)
        report.finished()
        raise GeneratorExit
    assert statuses(metrics) == {"OK": 1}
    value = metrics.registry.get_sample_value
    labels = {"model_name": "m", "engine": "gateway"}
    assert value("vllm:time_to_first_token_seconds_count", labels) == 1
    assert value("vllm:inter_token_latency_seconds_count", labels) == 1
    assert value("vllm:request_generation_tokens_sum", labels) == 2
    reason = {**labels, "finished_reason": "length"}
    assert value("vllm:request_success_total", reason) == 1
    [record] = caplog.records
    assert record.getMessage() == "request ended"


def test_causes_are_labels() -> None:
    assert cause(WorkerLost("gone")) == "worker_lost"
