"""WorkerService: looking into one worker, for operators and tests."""

from __future__ import annotations

import grpc
from baton.v1 import types_pb2, worker_service_pb2, worker_service_pb2_grpc

from services.worker.mailroom import Mailroom


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
