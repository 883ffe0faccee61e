"""A gateway in this process: both doors and all that lies behind them; workers are played."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from baton.services.gateway import cluster as cluster_module
from baton.services.gateway.cluster import Cluster
from baton.services.gateway.frontend import Frontend
from baton.services.gateway.identity import Identify, ask_nobody
from baton.services.gateway.links import DecodeLink, Events, Token
from baton.services.gateway.router import Role, WorkerSnapshot
from baton.services.gateway.served_model import ServedModel
from baton.services.gateway.server import InferenceServicer
from baton.shared.directory.workers import (
    ClusterView,
    ModelFacts,
    WorkerLoad,
    WorkerRecord,
    model_of,
)
from baton.shared.kv.block_hash import chain_hashes, is_boundary, root_hash
from baton.shared.kv.capability import Capability
from baton.shared.kv.capacity import Capacity, GroupShare
from baton.shared.kv.sequence import AttemptKey, FinishReason
from baton.shared.kv.sequence import Sequence as EngineSequence
from baton.shared.rpc.convert import sequence_from_pb
from baton.shared.rpc.serve import PUBLIC_MESSAGE_BYTES, Endpoint
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc, types_pb2
from tests.unit.gateway.null_frontend import Reply, ask, serving

BLOCK_SIZE = 16
TOKEN = 7
MODEL: Any = SimpleNamespace(vocab_size=1000, max_position_embeddings=4096, eos_token_ids=[2])
CAPABILITY = Capability(
    model_digest="m",
    dtype="float32",
    cache_dtype="float32",
    block_size=BLOCK_SIZE,
    layout=("full",),
    determinism="exact",
)


def worker_record(worker_id: str) -> WorkerRecord:
    """Named after its role: `both-0`, `prefill-0`, ..."""
    return WorkerRecord(
        worker_id=worker_id,
        incarnation=f"{worker_id}-once",
        role=cast(Role, worker_id.split("-")[0]),
        address="127.0.0.1:1",
        capability=CAPABILITY,
        model=ModelFacts("null", "llama", 1000, (2,)),
        capacity=Capacity(BLOCK_SIZE, (256,), (GroupShare(0),), 4096),
        load=WorkerLoad(0, 0, (256,), {}),
    )


class PlayedDirectory:
    """Knows the workers, and who holds which prefix."""

    def __init__(self, worker_ids: Sequence[str]) -> None:
        self.holders: dict[bytes, dict[str, str]] = {}
        self._records = [worker_record(worker_id) for worker_id in worker_ids]
        self.workers = self.prefix_index = self

    async def lookup(self, hashes: Sequence[bytes]) -> list[dict[str, str]]:
        return [self.holders.get(block_hash, {}) for block_hash in hashes]

    async def view(self, gateway: str) -> ClusterView:
        return ClusterView(model_of(self._records[0]), self._records, refusal=None)

    async def aclose(self) -> None:
        pass


Script = Callable[[EngineSequence, Events], None]
"""What a worker tells of a sequence that was started on it."""


def one_token(sequence: EngineSequence, events: Events) -> None:
    events.put_nowait(Token(sequence.first_index, TOKEN, FinishReason.LENGTH))


class PlayedWorker:
    """Answers by the gateway's script, and lists the blocks of the prompts that it got."""

    def __init__(self, gateway: WholeGateway, worker: WorkerSnapshot) -> None:
        self._gateway, self._worker = gateway, worker

    def start(
        self, spec: types_pb2.SequenceSpec, source: object, events: Events, patience: float
    ) -> int:
        sequence = sequence_from_pb(
            types_pb2.SequenceSpec.FromString(spec.SerializeToString()),
            self._worker.capability_hash,
        )
        self._gateway.started.append((self._worker.worker_id, sequence))
        root = root_hash(self._worker.capability_hash, salt=sequence.salt)
        hashes = chain_hashes(root, sequence.prompt_token_ids, BLOCK_SIZE)
        for index, block_hash in enumerate(hashes):
            if is_boundary(index, BLOCK_SIZE):
                holders = self._gateway.directory.holders.setdefault(block_hash, {})
                holders[self._worker.worker_id] = self._worker.incarnation
        self._gateway.script(sequence, events)
        return 1

    def end(self, number: int, key: AttemptKey) -> None:
        pass


class WholeGateway(Cluster):
    def __init__(self, worker_ids: Sequence[str]) -> None:
        super().__init__(
            "unix:///nowhere",
            "c",
            incarnation="g" * 32,
            model=MODEL,
            served=ServedModel("null", MODEL.vocab_size),
        )
        self.directory = PlayedDirectory(worker_ids)
        self.started: list[tuple[str, EngineSequence]] = []
        """Worker and sequence, in order, of all that was started."""
        self.script: Script = one_token
        self.grpc_address = self.http_address = ""

    def link(self, worker: WorkerSnapshot) -> DecodeLink:
        return cast(DecodeLink, PlayedWorker(self, worker))

    async def ask_grpc(
        self, request: pb.GenerateRequest, **metadata: str
    ) -> list[pb.GenerateResponse]:
        async with grpc.aio.insecure_channel(self.grpc_address) as channel:
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
            return [each async for each in stub.Generate(request, metadata=[*metadata.items()])]

    async def ask_http(
        self, body: dict[str, Any], *, path: str = "/v1/completions", **headers: str
    ) -> Reply:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return await ask(self.http_address, path, body, headers=lines)


@asynccontextmanager
async def whole_gateway(
    monkeypatch: pytest.MonkeyPatch,
    *,
    worker_ids: Sequence[str] = ("both-0",),
    identify: Identify = ask_nobody,
) -> AsyncIterator[WholeGateway]:
    gateway = WholeGateway(worker_ids)

    async def opened(url: str, name: str) -> PlayedDirectory:
        return gateway.directory

    monkeypatch.setattr(cluster_module, "open_directory", opened)
    await gateway.connect()
    frontend = Frontend(
        gateway, None, model=MODEL, model_name="null", incarnation="g" * 32, identify=identify
    )
    endpoint = Endpoint(max_message_bytes=PUBLIC_MESSAGE_BYTES)
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceServicer(frontend), endpoint.server
    )
    await endpoint.start("127.0.0.1", 0, [])
    gateway.grpc_address = endpoint.address
    async with serving(frontend) as http:
        gateway.http_address = http.address
        try:
            yield gateway
        finally:
            await endpoint.stop(0)
            await gateway.close()
