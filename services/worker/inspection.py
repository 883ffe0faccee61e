"""WorkerService: looking into one worker, for operators and tests."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import grpc

from baton.services.worker.mailroom import Mailroom
from baton.services.worker.sequence_table import SequenceTable
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import BlockTable, SequenceState
from baton.shared.telemetry import Counters
from baton.v1 import types_pb2, worker_service_pb2, worker_service_pb2_grpc


def snapshot(
    table: SequenceTable,
    pools: Pools,
    counters: Counters,
    check_integrity: bool,
    orphans: Seq[Seq[BlockTable]],
    kept: Iterable[tuple[int, int]] = (),
) -> worker_service_pb2.GetWorkerStateResponse:
    """On the engine thread, between two steps.

    `orphans`: block tables, by group, that sequences which have ended left to a step in flight.
    `kept`: (group, slot) that are held beside tables.
    """
    sequences = table.all()
    num_waiting = len(table.in_state(SequenceState.WAITING))
    state = worker_service_pb2.GetWorkerStateResponse(
        num_blocks=sum(pool.num_blocks for pool in pools.by_number),
        num_free_blocks=sum(pools.num_free),
        num_quarantined_blocks=pools.num_quarantined,
        num_cached_blocks=pools.prefix_cache.num_cached,
        num_checkpoints=pools.num_checkpoints,
        num_free_blocks_by_pool=pools.num_free,
        num_waiting=num_waiting,
        num_running=len(sequences) - num_waiting,
        counters=worker_service_pb2.WorkerCounters(
            **{f"num_{name}": value for name, value in counters.items()}
        ),
    )
    if check_integrity:
        try:
            held = [sequence.block_tables for sequence in sequences if sequence.is_admitted]
            pools.check_integrity([*held, *orphans], kept)
        except AssertionError as error:
            state.integrity_error = str(error)
    return state


class WorkerServicer(worker_service_pb2_grpc.WorkerServiceServicer):
    def __init__(self, mailroom: Mailroom, role: types_pb2.WorkerRole) -> None:
        self._mailroom = mailroom
        self._role = role

    async def GetWorkerState(
        self,
        request: worker_service_pb2.GetWorkerStateRequest,
        context: grpc.aio.ServicerContext[
            worker_service_pb2.GetWorkerStateRequest, worker_service_pb2.GetWorkerStateResponse
        ],
    ) -> worker_service_pb2.GetWorkerStateResponse:
        state = await self._mailroom.inspect(check_integrity=request.check_integrity)
        me = self._mailroom.identity
        state.worker.worker_id, state.worker.incarnation = me.worker_id, me.incarnation
        state.role = self._role
        state.capability_hash = self._mailroom.capability_hash
        return state
