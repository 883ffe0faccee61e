"""How long a request may be: what workers that go together take."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from baton.services.gateway.cluster import Cluster
from baton.services.gateway.served_model import ServedModel
from baton.shared.directory.workers import Role, WorkerRecord
from baton.shared.model_files.info import ModelInfo
from tests.unit.gateway.whole_gateway import worker_record

MODEL = ModelInfo("llama", 1000, 8192, (2,), 1)


def record(role: str, length: int, num_blocks: int = 256) -> WorkerRecord:
    any_role = worker_record(f"{role}-{length}-{num_blocks}")
    capacity = replace(any_role.capacity, max_model_len=length, num_blocks=(num_blocks,))
    return replace(any_role, role=cast(Role, role), capacity=capacity)


def a_cluster() -> Cluster:
    served = ServedModel("null", MODEL.vocab_size)
    return Cluster("redis://127.0.0.1:1/0", "c", incarnation="g", model=MODEL, served=served)


def limits(*records: WorkerRecord) -> tuple[int, int | None]:
    cluster = a_cluster()
    cluster.workers.seen(records)
    found = cluster.limits()
    return found.max_model_len, found.max_pool_tokens


def test_without_workers_the_model_s_own() -> None:
    assert limits() == (8192, None)


def test_a_sequence_must_fit_both_workers() -> None:
    assert limits(record("prefill", 3000), record("decode", 2000)) == (2000, 2000)
    assert limits(record("prefill", 1000), record("decode", 2000)) == (1000, 1000)
    # Until there is a partner, what the first one takes.
    assert limits(record("prefill", 1000)) == (1000, 1000)


def test_a_worker_that_takes_less_does_not_shorten_what_others_take() -> None:
    pair = record("prefill", 3000), record("decode", 2000)
    assert limits(*pair, record("decode", 100), record("both", 50)) == (2000, 2000)


def test_pools_and_lengths_are_told_apart() -> None:
    pair = record("prefill", 4000, num_blocks=100), record("decode", 3000, num_blocks=200)
    assert limits(*pair) == (3000, 1600)


def test_they_are_those_of_the_workers_that_are_there() -> None:
    cluster, pair = a_cluster(), (record("prefill", 3000), record("decode", 2000))
    assert cluster.limits().max_model_len == 8192
    cluster.workers.seen(pair)
    found = cluster.limits()
    assert found.max_model_len == 2000
    busy = replace(pair[1], load=replace(pair[1].load, num_running=3))
    cluster.workers.seen([busy])
    assert cluster.limits() is found, "the load has no say"
    started_anew = replace(busy, capacity=replace(busy.capacity, max_model_len=2500))
    cluster.workers.seen([started_anew])
    assert cluster.limits().max_model_len == 2500
    cluster.workers.keep(unseen_s=60.0, wanted=lambda each: each.role == "prefill")
    assert cluster.limits().max_model_len == 3000
