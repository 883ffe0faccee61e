"""The worker's engine loop without a worker: no RPC, no directory, one thread.

What it measures is the engine as workers run it, scheduler and bookkeeping included.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np

from baton.services.worker import messages as msg
from baton.services.worker.drafting import Drafting
from baton.services.worker.engine_loop import EngineLoop
from baton.services.worker.failpoints import Failpoints
from baton.services.worker.sealing import Sealer
from baton.services.worker.sequence_table import Recipient
from baton.services.worker.stepper import BatchLimits
from baton.shared.engine.block_sums import BlockSums, TakeSums, Writes
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.cache_spec import CacheGroup
from baton.shared.kv.digest import Uint64Array
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey, Sequence
from baton.shared.sampling import SamplingParams
from baton.shared.telemetry import Counters, Trace
from baton.v1 import decode_service_pb2

GREEDY = SamplingParams(temperature=0.0)
_GATEWAY = "gateway"


class NoBlockSums:
    """In place of digests, to see what they cost."""

    def __init__(self, groups: Seq[CacheGroup]) -> None:
        self._groups = groups

    def __call__(self, block_ids: Seq[int], group: int = 0) -> Uint64Array:
        return np.zeros((len(block_ids), self._groups[group].spec.num_kv_heads), np.uint64)

    def start(
        self, block_ids: Seq[int], group: int = 0, *, behind: Writes | None = None
    ) -> TakeSums:
        sums = self(block_ids, group)
        return lambda: sums


@dataclass
class Steps:
    """What the engine delivered, by step with tokens."""

    at_s: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_streams: list[int] = field(default_factory=list)
    """Sequences whose tokens these are."""

    def full(self, batch: int, num_steps: int, num_before: int = 0) -> list[int]:
        """The first `num_steps` + 1 steps in which so many sequences had tokens, behind some that
        do not count.

        Raises:
            RuntimeError: there were fewer.
        """
        full = [i for i, num in enumerate(self.num_streams) if num == batch]
        if len(full) < num_before + num_steps + 1:
            most = max(self.num_streams, default=0)
            raise RuntimeError(
                f"only {len(full)} of {len(self.at_s)} steps had all {batch} sequences; the most "
                f"that one had is {most}"
            )
        return full[num_before : num_before + num_steps + 1]


class InProcessEngine:
    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_num_seqs: int = 256,
        token_budget: int | None = None,
        with_digests: bool = True,
        drafting: Drafting | None = None,
    ) -> None:
        self.runner = runner
        self.max_num_seqs = max_num_seqs
        self.pools = Pools(runner.groups, runner.capacity)
        self._inbox: queue.SimpleQueue[msg.Command] = queue.SimpleQueue()
        sums: BlockSums = runner.block_sums()
        if not with_digests:
            sums = NoBlockSums(runner.groups)
        failpoints = Failpoints(set())
        self.engine = EngineLoop(
            runner,
            self.pools,
            Sealer(self.pools, runner.kv_cache, sums, "ab" * 16, "c" * 64, failpoints),
            identity=msg.Peer("benchmark", "ab" * 16, ""),
            limits=BatchLimits(
                token_budget or runner.token_budget,
                max_num_seqs,
                backlog_budget=None if token_budget else runner.backlog_budget,
            ),
            inbox=self._inbox,
            submit_pull=lambda job: None,
            deliver=self._take,
            failpoints=failpoints,
            counters=Counters(),
            trace=Trace(None, "benchmark"),
            drafting=drafting,
        )
        self._names = count(1)
        self.steps = Steps()
        self.failures: list[str] = []

    def submit(
        self, prompt: Seq[int], max_tokens: int, how: SamplingParams = GREEDY, **more: Any
    ) -> Sequence:
        """Local prefill, nothing ends early. `more`: other fields of the sequence."""
        number = next(self._names)
        params = replace(how, max_tokens=max_tokens, ignore_eos=True)
        key = AttemptKey(f"benchmark-{number}", 0, 1)
        sequence = Sequence(key, tuple(prompt), params, **more)
        self._inbox.put(msg.StartDecode(sequence, Recipient(_GATEWAY, number), None))
        return sequence

    def run_until_idle(self) -> Steps:
        """Runs all that was submitted → when tokens came, and how many at a time."""
        self.steps = Steps()
        self.engine.run_once(may_wait=False)
        while self.engine.num_sequences:
            self.engine.run_once(may_wait=False)
        while self.engine.is_busy:
            self.engine.run_once(may_wait=False)
        if self.failures:
            raise RuntimeError(f"the engine failed: {self.failures[0]}")
        return self.steps

    def decode(self, batch: int, context: int, num_steps: int) -> list[float]:
        """Seconds of each of `num_steps` steps in which `batch` sequences decode, their contexts
        growing from `context` tokens on."""
        return self.decode_cached(self.cached_prompts(batch, context), num_steps)

    def cached_prompts(self, batch: int, num_tokens: int) -> list[list[int]]:
        """All but their last block is in the prefix cache, so that they start together."""
        prompts = random_prompts(batch, num_tokens, self.runner.model_config.vocab_size)
        for prompt in prompts:
            self.submit(prompt, 1)
        self.run_until_idle()
        return prompts

    def decode_cached(
        self,
        prompts: Seq[Seq[int]],
        num_steps: int,
        how: SamplingParams = GREEDY,
        more: Callable[[], dict[str, Any]] = dict,
    ) -> list[float]:
        """As `decode`, behind `cached_prompts`. `how` and `more`: as of `submit`; the latter is
        made for each."""
        batch = len(prompts)
        # Where layers keep states, of most prompts none is kept: they are computed anew.
        are_found = all(group.spec.grows for group in self.runner.groups)
        each = self.pools.block_size if are_found else max(map(len, prompts))
        num_starting = 2 * (batch * each // self.runner.token_budget + 2)
        for prompt in prompts:
            self.submit(prompt, num_starting + num_steps, how, **more())
        steps = self.run_until_idle()
        times = [steps.at_s[i] for i in steps.full(batch, num_steps)]
        return [b - a for a, b in zip(times[:-1], times[1:], strict=True)]

    def prefill(self, batch: int, num_tokens: int) -> float:
        """Seconds from the prompts' arrival to the last one's first token."""
        prompts = random_prompts(batch, num_tokens, self.runner.model_config.vocab_size)
        started_s = time.perf_counter()
        for prompt in prompts:
            self.submit(prompt, 1)
        return self.run_until_idle().at_s[-1] - started_s

    def prefill_behind(self, prefix: Seq[int], num_tokens: int) -> float:
        """As `prefill`, of a prompt whose first tokens are in the prefix cache."""
        [rest] = random_prompts(1, num_tokens, self.runner.model_config.vocab_size)
        started_s = time.perf_counter()
        self.submit([*prefix, *rest], 1)
        return self.run_until_idle().at_s[-1] - started_s

    def _take(self, messages: list[msg.Outgoing]) -> None:
        for message in messages:
            if not isinstance(message, msg.ToGateway):
                continue
            response: decode_service_pb2.DecodeResponse = message.message
            if response.HasField("step"):
                self.steps.at_s.append(time.perf_counter())
                self.steps.num_tokens.append(len(response.step.slots))
                self.steps.num_streams.append(len(set(response.step.slots)))
            elif response.HasField("failed"):
                self.failures.append(response.failed.failure.message)


def random_prompts(num_prompts: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Different in every call: nothing is found in the prefix cache."""
    rows = np.random.default_rng().integers(0, vocab_size, (num_prompts, num_tokens))
    return [row.tolist() for row in rows]
