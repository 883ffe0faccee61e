"""The worker's metrics: ours, and those by the names that vLLM gave them.

The engine thread counts in plain integers, and observes one step, or one hand-off, at a time. All
else is asked of the engine when somebody scrapes: it answers between two steps, as it does for
heartbeats (`msg.Inspect`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from baton.services.worker import messages as msg
from baton.shared.metrics import (
    BYTES_BUCKETS,
    SECONDS_BUCKETS,
    TOKENS_BUCKETS,
    counter,
    counters_of,
    gauge,
    gauges,
    info,
)
from baton.v1 import worker_service_pb2

_ANSWER_S = 0.2
"""A scrape does not wait longer for a step to end: it is told the last state then."""

_MASK_SECONDS_BUCKETS = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005),
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
)

_KEPT_OF_RATE = 0.95
"""Of what was measured before, with each step."""

_COUNTERS = {
    "steps": "Engine steps",
    "computed_prompt_tokens": "Prompt tokens that were computed here",
    "cached_prompt_tokens": "Prompt tokens that were found in the cache here instead",
    "computed_blocks": "Full blocks that were computed for prompts",
    "pulled_blocks": "Blocks that were read from another worker and verified",
    "digest_mismatches": "Blocks whose bytes were not those that were sealed",
    "drafts": "Chains of drafts that decode steps checked",
    "drafted_tokens": "Tokens in them",
    "accepted_tokens": "Of these, tokens that were what was drawn",
    "captured_prompt_steps": "On a GPU, steps with prompt chunks that came from a CUDA graph",
    "launched_prompt_steps": "On a GPU, those that were launched kernel by kernel",
    "kept_states": "States of prompts and answers that were kept for later prompts",
    "restored_states": "Prompts that began with such a state",
    "pulled_state_bytes": "Of the bytes that were read from other workers, those of states",
    "preemptions": "Sequences that gave way because no block was free",
    "aborted_sequences": "Sequences that were ended early: cancelled, preempted or failed",
}
_GAUGES = {
    "waiting_sequences": "Sequences in the queue",
    "running_sequences": "Sequences that are computed, or handed over, right now",
    "claims": "Claims that readers have on sequences here",
    "blocks": "Blocks of the pool",
    "free_blocks": "Blocks that could be taken now, cached ones included",
    "cached_blocks": "Blocks that can be found by their hash",
    "checkpoints": "States that are kept for later prompts",
    "quarantined_blocks": "Blocks that a pull may still write to, whoever has given them back",
}


def _field(name: str) -> str:
    """`waiting_sequences` → `num_waiting`, as the snapshot has it."""
    return f"num_{name.removesuffix('_sequences')}"


class EngineMetrics:
    """What the engine thread observes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.num_queried_tokens = 0
        """Prompt tokens of the sequences admitted to be computed here."""
        self.num_given_up = 0
        """As of `Drafting`."""
        self.num_joined = 0
        """Sequences whose prompt, and first token, came from another worker."""
        self._prompt_tokens = self._prompt_s = 0.0
        step_seconds = Histogram(
            "baton_step_seconds",
            "Time of an engine step, by what it computed. On a GPU the drafts that it checks may "
            "still be in the making when it begins: what is left of that is part of it",
            ["kind"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        step_tokens = Histogram(
            "baton_step_tokens",
            "Tokens of an engine step, by what it computed",
            ["kind"],
            buckets=TOKENS_BUCKETS,
            registry=registry,
        )
        self._of_kind = {
            kind: (step_seconds.labels(kind), step_tokens.labels(kind))
            for kind in ("prefill", "decode", "mixed")
        }
        self._mask_seconds = Histogram(
            "baton_mask_seconds",
            "Time that the grammar of a constrained sequence took of a step",
            buckets=_MASK_SECONDS_BUCKETS,
            registry=registry,
        )
        self._handoff_seconds = Histogram(
            "baton_handoff_seconds",
            "Prompt computed at its prefill worker to all blocks here and verified",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._handoff_bytes = Histogram(
            "baton_handoff_bytes",
            "Bytes that a hand-off read from the prefill worker",
            buckets=BYTES_BUCKETS,
            registry=registry,
        )

    @property
    def prompt_tokens_per_s(self) -> int:
        """Of steps that computed nothing else, the latest above all; 0: there were none."""
        return int(self._prompt_tokens / self._prompt_s) if self._prompt_s else 0

    def took_step(self, seconds: float, *, num_decoded_tokens: int, num_prompt_tokens: int) -> None:
        """`num_decoded_tokens`: computed for sequences that decode, drafts included."""
        if num_prompt_tokens and not num_decoded_tokens:
            self._prompt_tokens = self._prompt_tokens * _KEPT_OF_RATE + num_prompt_tokens
            self._prompt_s = self._prompt_s * _KEPT_OF_RATE + seconds
        kind = "decode" if not num_prompt_tokens else "mixed" if num_decoded_tokens else "prefill"
        in_seconds, in_tokens = self._of_kind[kind]
        in_seconds.observe(seconds)
        in_tokens.observe(num_decoded_tokens + num_prompt_tokens)

    def made_masks(self, seconds: float) -> None:
        self._mask_seconds.observe(seconds)

    def joined(self, transfer_s: float, num_bytes: int) -> None:
        self.num_joined += 1
        self._handoff_seconds.observe(transfer_s)
        self._handoff_bytes.observe(num_bytes)


@dataclass(frozen=True, slots=True)
class _Told:
    """By the engine, all of one moment: what is counted may not go back from scrape to scrape."""

    state: worker_service_pb2.GetWorkerStateResponse
    num_queried_tokens: int = 0
    num_joined: int = 0


class WorkerCollector(Collector):
    """Asked from the threads of the metrics port."""

    def __init__(
        self,
        inbox: queue.SimpleQueue[msg.Command],
        engine: EngineMetrics,
        *,
        about: Mapping[str, str],
        path_rates: Callable[[], Mapping[str, float]],
        is_directory_reachable: Callable[[], bool],
        is_draining: Callable[[], bool],
    ) -> None:
        """`about`: labels of baton_build_info, `model_name` and `worker_id` among them;
        `path_rates`: bytes per second by worker id."""
        self._inbox = inbox
        self._engine = engine
        self._about = about
        self._path_rates = path_rates
        self._is_directory_reachable = is_directory_reachable
        self._is_draining = is_draining
        self._told = _Told(worker_service_pb2.GetWorkerStateResponse())

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry asks already when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        told = self._ask()
        state = told.state
        yield info("baton_build_info", "What this process is", self._about)
        for name, help in _GAUGES.items():
            yield gauge(f"baton_{name}", help, getattr(state, _field(name)))
        for name, help in _COUNTERS.items():
            yield counter(f"baton_{name}", help, getattr(state.counters, _field(name)))
        yield from self._tokens(told)
        yield from self._drafts(state)
        yield gauges(
            "baton_path_bytes_per_second",
            "Rate of the path to a peer, as measured when it was connected",
            ("peer",),
            {(peer,): rate for peer, rate in self._path_rates().items()},
        )
        yield gauge(
            "baton_prompt_tokens_per_second",
            "Prompt tokens computed per second, in steps that compute nothing else",
            self._engine.prompt_tokens_per_s,
        )
        yield gauge(
            "baton_directory_reachable",
            "1 while the directory answers",
            self._is_directory_reachable(),
        )
        yield gauge("baton_draining", "1 from SIGTERM on", self._is_draining())

    def _ask(self) -> _Told:
        is_told = threading.Event()

        def take(state: worker_service_pb2.GetWorkerStateResponse) -> None:
            """On the engine thread. What comes too late is there for the next scrape."""
            self._told = _Told(state, self._engine.num_queried_tokens, self._engine.num_joined)
            is_told.set()

        self._inbox.put(msg.Inspect(False, take))
        is_told.wait(_ANSWER_S)
        return self._told

    def _tokens(self, told: _Told) -> Iterator[Metric]:
        """Summed over workers each token counts once: the first one of a prompt that was handed
        over is its prefill worker's."""
        state, counters, num_queried = told.state, told.state.counters, told.num_queried_tokens
        num_generated = counters.num_generated_tokens - told.num_joined
        used = state.num_blocks - state.num_free_blocks
        labels = {"model_name": self._about["model_name"], "engine": self._about["worker_id"]}
        for name, help, value in (
            ("generated_tokens", "Tokens that were drawn here", num_generated),
            ("queried_prompt_tokens", "Prompt tokens looked for in the cache here", num_queried),
            (
                "pulled_bytes",
                "Bytes of the blocks that were read from another worker and verified",
                counters.num_pulled_bytes,
            ),
        ):
            yield counter(f"baton_{name}", help, value)
        usage = used / state.num_blocks if state.num_blocks else 0.0
        for name, help, level in (
            (
                "num_requests_running",
                "Sequences that are computed, or handed over, right now",
                state.num_running,
            ),
            ("num_requests_waiting", "Sequences in the queue", state.num_waiting),
            ("kv_cache_usage_perc", "Share of blocks in use, 0 to 1", usage),
        ):
            yield gauge(f"vllm:{name}", help, level, labels)
        for name, help, value in (
            ("prefix_cache_queries", "Prompt tokens looked for in the cache", num_queried),
            (
                "prefix_cache_hits",
                "Prompt tokens found in the cache",
                counters.num_cached_prompt_tokens,
            ),
            ("prompt_tokens", "Prompt tokens of sequences computed here", num_queried),
            ("generation_tokens", "Tokens that were drawn here", num_generated),
            ("num_preemptions", "Sequences that gave way", counters.num_preemptions),
        ):
            yield counter(f"vllm:{name}", help, value, labels)

    def _drafts(self, state: worker_service_pb2.GetWorkerStateResponse) -> Iterator[Metric]:
        counters, num_drafts = state.counters, state.counters.num_drafts
        by_position: dict[tuple[str, ...], float] = {
            (str(place),): float(count)
            for place, count in enumerate(state.num_accepted_by_position)
        }
        help_by_position = (
            "Drafted tokens that were what was drawn, by place in their chain, from 0"
        )
        yield counters_of(
            "baton_accepted_tokens_by_position", help_by_position, ("position",), by_position
        )
        yield gauge(
            "baton_mean_accepted_length",
            "Tokens that a chain of drafts brought on average, the one drawn behind it included",
            1 + counters.num_accepted_tokens / num_drafts if num_drafts else 0.0,
        )
        yield counter(
            "baton_given_up_drafts",
            "Sequences for which nobody guesses any more: a step of who guesses failed",
            self._engine.num_given_up,
        )
        labels = {"model_name": self._about["model_name"], "engine": self._about["worker_id"]}
        for name, help, value in (
            ("num_drafts", "Chains of drafts that were checked", num_drafts),
            ("num_draft_tokens", "Tokens in them", counters.num_drafted_tokens),
            ("num_accepted_tokens", "Of these, accepted ones", counters.num_accepted_tokens),
        ):
            yield counter(f"vllm:spec_decode_{name}", help, value, labels)
        yield counters_of(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            help_by_position,
            (*labels, "position"),
            {(*labels.values(), *place): count for place, count in by_position.items()},
        )
