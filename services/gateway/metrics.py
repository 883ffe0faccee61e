"""The gateway's metrics: ours, and those by the names that vLLM gave them.

Dashboards and autoscalers read the `vllm:` names. Of these the gateway has what a client sees
(times, answers) and the load of the whole cluster; each worker has its own (worker/metrics.py).
Times are between two moments of this process, on its monotonic clock.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from baton.services.gateway.cluster import Cluster
from baton.shared.directory.workers import WorkerRecord
from baton.shared.kv.sequence import FinishReason
from baton.shared.metrics import (
    SECONDS_BUCKETS,
    TOKENS_BUCKETS,
    counter,
    gauge,
    gauges,
    info,
    new_registry,
)
from baton.shared.telemetry import Counters


class GatewayMetrics:
    """What is observed as it happens, at most once for each message to a client."""

    def __init__(self, model_name: str) -> None:
        self.registry: CollectorRegistry = new_registry()
        self.model_name = model_name
        self.requests = Counter(
            "baton_requests",
            "Requests that have ended, by the status that the client got",
            ["status"],
            registry=self.registry,
        )
        self.extra_attempts = Counter(
            "baton_extra_attempts",
            "Attempts after the first of a request, by what ended the one before",
            ["cause"],
            registry=self.registry,
        )
        self._http_refused = Counter(
            "baton_http_refused",
            "HTTP requests that failed before they were one of baton_requests, by status",
            ["status"],
            registry=self.registry,
        )
        self._http_asked = Counter(
            "baton_http_requests",
            "HTTP requests that became some of baton_requests, by endpoint",
            ["endpoint"],
            registry=self.registry,
        )
        self.ttft = self._seconds("time_to_first_token", "Arrival to first token")
        self.itl = self._seconds(
            "inter_token_latency", "Gap between an answer's messages with tokens"
        )
        self.e2e = self._seconds("e2e_request_latency", "Arrival to last token")
        self.tpot = self._seconds(
            "request_time_per_output_token", "Mean gap between the tokens of an answer"
        )
        self.queue = self._seconds(
            "request_queue_time", "Arrival to admission by the prefill worker, where there is one"
        )
        self.prefill = self._seconds("request_prefill_time", "That admission to the first token")
        self.decode = self._seconds("request_decode_time", "First token to last")
        self.prompt_tokens = self._tokens(
            "request_prompt_tokens", "Prompt tokens of an answered request"
        )
        self.generation_tokens = self._tokens(
            "request_generation_tokens",
            "Tokens drawn for an answer, without those that its client had",
        )
        success = Counter(
            "vllm:request_success",
            "Answers of answered requests, n of each, by why they ended",
            ["model_name", "engine", "finished_reason"],
            registry=self.registry,
        )
        self.success = {
            reason: success.labels(*self._labels, reason.name.lower()) for reason in FinishReason
        }

    def watch(
        self,
        cluster: Cluster,
        counters: Counters,
        num_in_flight: Callable[[], int],
        incarnation: str,
        version: str,
    ) -> None:
        """From now on each scrape has what cluster and counters keep anyway, too."""
        about = {
            "version": version,
            "model_name": self.model_name,
            "role": "gateway",
            "incarnation": incarnation,
        }
        engine = dict(zip(("model_name", "engine"), self._labels, strict=True))
        self.registry.register(_AtScrape(cluster, counters, num_in_flight, about, engine))

    def http_refused(self, status: int) -> None:
        self._http_refused.labels(str(status)).inc()

    def http_asked(self, endpoint: str) -> None:
        self._http_asked.labels(endpoint).inc()

    @property
    def _labels(self) -> tuple[str, str]:
        return self.model_name, "gateway"

    def _seconds(self, name: str, help: str) -> Histogram:
        return self._histogram(f"{name}_seconds", help, SECONDS_BUCKETS)

    def _tokens(self, name: str, help: str) -> Histogram:
        return self._histogram(name, help, TOKENS_BUCKETS)

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}",
            help,
            ["model_name", "engine"],
            buckets=buckets,
            registry=self.registry,
        )
        return histogram.labels(*self._labels)


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """Requests, each counted once, and the share of blocks in use on the fuller side."""

    num_waiting: int
    num_running: int
    cache_usage: float


def cluster_load(workers: Iterable[WorkerRecord]) -> ClusterLoad:
    """From what the workers said last.

    A request of a pair is at both of its workers: on the decode side from its start on, where it
    counts as waiting while the prefill side queues or computes its prompt.
    """
    waiting: Counts[str] = Counts()
    running: Counts[str] = Counts()
    blocks: Counts[str] = Counts()
    free: Counts[str] = Counts()
    for worker in workers:
        waiting[worker.role] += worker.load.num_waiting
        running[worker.role] += worker.load.num_running
        side = "prefill" if worker.role == "prefill" else "decode"
        blocks[side] += sum(worker.capacity.num_blocks)
        free[side] += sum(worker.load.num_free_blocks)
    num_paired = max(waiting["decode"] + running["decode"], waiting["prefill"] + running["prefill"])
    num_queued = max(waiting["prefill"], waiting["decode"] - running["prefill"])
    usages = (1 - free[side] / blocks[side] for side in blocks if blocks[side])
    return ClusterLoad(
        num_waiting=num_queued + waiting["both"],
        num_running=max(0, num_paired - num_queued) + running["both"],
        cache_usage=max(usages, default=0.0),
    )


class _AtScrape(Collector):
    """Asked from several threads, so it only looks."""

    def __init__(
        self,
        cluster: Cluster,
        counters: Counters,
        num_in_flight: Callable[[], int],
        about: dict[str, str],
        engine: dict[str, str],
    ) -> None:
        self._cluster = cluster
        self._counters = counters
        self._num_in_flight = num_in_flight
        self._about = about
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry asks already when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        cluster, counters = self._cluster, self._counters
        yield info("baton_build_info", "What this process is", self._about)
        for name, help, key in (
            ("admitted_requests", "Requests that passed the checks", "requests"),
            ("attempts", "Attempts, the first of each request included", "attempts"),
            (
                "cancelled_requests",
                "Requests given up: the client went away, or another of its prompts failed",
                "cancelled",
            ),
        ):
            yield counter(f"baton_{name}", help, counters[key])
        yield gauge("baton_requests_in_flight", "Requests at this gateway", self._num_in_flight())
        yield gauge(
            "baton_requests_without_worker",
            "Of these, those that no worker can take now: there is none, or none has room",
            cluster.routing.num_waiting,
        )
        yield gauge(
            "baton_directory_reachable",
            "1 while the directory answers",
            cluster.is_directory_reachable,
        )
        by_role: dict[tuple[str, ...], float] = {
            (role, "true"): 0 for role in ("prefill", "decode", "both")
        }
        for snapshot in cluster.snapshots():
            labels = (snapshot.role, str(not snapshot.suspect).lower())
            by_role[labels] = by_role.get(labels, 0) + 1
        yield gauges(
            "baton_workers",
            "Workers that the gateway knows; healthy ones get requests",
            ("role", "healthy"),
            by_role,
        )
        yield from self._of_the_cluster()

    def _of_the_cluster(self) -> Iterator[Metric]:
        load = cluster_load(self._cluster.records())
        yield gauge(
            "vllm:num_requests_running",
            "Requests that workers compute, in the whole cluster; with n each sample is one",
            load.num_running,
            self._engine,
        )
        yield gauge(
            "vllm:num_requests_waiting",
            "Requests in queues, in the whole cluster, and without a worker here",
            load.num_waiting + self._cluster.routing.num_waiting,
            self._engine,
        )
        yield gauge(
            "vllm:kv_cache_usage_perc",
            "Share of blocks in use, 0 to 1, on the fuller of the prefill and the decode side",
            load.cache_usage,
            self._engine,
        )
