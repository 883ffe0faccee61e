"""One worker of the simulation: a real engine loop, its pools, and what is asked of its puller."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable

from baton.services.worker import messages as msg
from baton.services.worker.engine_loop import EngineLoop
from baton.services.worker.failpoints import Failpoints
from baton.services.worker.sealing import Sealer
from baton.services.worker.stepper import BatchLimits
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey
from baton.shared.telemetry import Counters, Trace
from baton.shared.transfer.puller import PullJob
from baton.v1 import kv_service_pb2, worker_service_pb2

CAPABILITY = "c" * 64
SMALL_STEPS = BatchLimits(token_budget=8, max_num_seqs=4)


class SimWorker:
    """One start of one worker."""

    def __init__(
        self,
        name: str,
        incarnation: str,
        runner: ModelRunner,
        post: Callable[[SimWorker, list[msg.Outgoing]], None],
        limits: BatchLimits = SMALL_STEPS,
    ) -> None:
        """`post` takes what the engine delivers at the end of an iteration. A runner may have what
        drafts for its worker, `drafting`."""
        self.peer = msg.Peer(name, incarnation, f"{name}.test")
        self.runner = runner
        self.pools = Pools(runner.groups, runner.capacity)
        self.inbox: queue.SimpleQueue[msg.Command] = queue.SimpleQueue()
        self.jobs: deque[PullJob] = deque()
        self.counters = Counters()
        self.gateway_stream = f"{name}-{incarnation}-gateway-1"
        self.ledger: set[AttemptKey] = set()
        """Attempts of which this worker would refresh the entry."""
        failpoints = Failpoints(set())
        self.engine = EngineLoop(
            runner,
            self.pools,
            Sealer(
                self.pools,
                runner.kv_cache,
                runner.block_sums(),
                incarnation,
                CAPABILITY,
                failpoints,
            ),
            identity=self.peer,
            limits=limits,
            inbox=self.inbox,
            submit_pull=self.jobs.append,
            deliver=lambda mail: post(self, mail),
            failpoints=failpoints,
            counters=self.counters,
            trace=Trace(None, name),
            drafting=getattr(runner, "drafting", None),
        )

    @property
    def incarnation(self) -> str:
        return self.peer.incarnation

    def description(self) -> kv_service_pb2.PoolDescription:
        cache = self.runner.kv_cache
        return kv_service_pb2.PoolDescription(
            incarnation=self.incarnation,
            groups=[
                kv_service_pb2.GroupBlocks(
                    offset_bytes=cache.pool_of(number).offset_bytes,
                    num_blocks=cache.pool_of(number).num_blocks,
                    block_bytes=cache.pool_of(number).block_bytes,
                    num_heads=group.num_pieces,
                )
                for number, group in enumerate(cache.groups)
            ],
        )

    def check(self) -> None:
        states: list[worker_service_pb2.GetWorkerStateResponse] = []
        self.engine._handle(msg.Inspect(True, states.append))
        assert [state.integrity_error for state in states] == [""]

    @property
    def leftovers(self) -> dict[str, object]:
        """All that must be nothing when every request is over; {} when it is."""
        engine = self.engine
        found = {
            "blocks": sum(self.pools.capacity.num_blocks) - sum(self.pools.num_free),
            "quarantined": self.pools.num_quarantined,
            "sequences": engine._table.all(),
            "claims": engine._claims._claims,
            "pulls": engine._pulls._pulls,
            "jobs": engine._pulls._jobs,
            "recipients": engine._table._recipients,
            "coming": engine._admitter._coming,
            "depths": engine._admitter._depths,
            "places": engine._admitter._new_places,
            "sources": engine._admitter._sources,
            "restored": engine._checkpoints._restored,
            "edges": engine._checkpoints._edges,
            "unclaimed": engine._unclaimed,
            "computed_at": engine._computed_at,
            "ledger": self.ledger,
        }
        return {name: left for name, left in found.items() if left}
