"""Worker: one process's engine, pool, transport and services, wired by role.

main thread      asyncio: gRPC streams, ticks, directory          (mailroom.py, hold.py)
engine thread    schedule → forward → publish                     (engine_loop.py)
puller thread    reads peers' blocks, checks digests              (shared/transfer/puller.py)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import logging
import queue
import secrets
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping

import torch
from prometheus_client import CollectorRegistry

from baton.services.decode.server import DecodeServicer
from baton.services.prefill.server import PrefillServicer
from baton.services.worker import messages as msg
from baton.services.worker.directory_sync import DirectorySync, check_model
from baton.services.worker.drafting import Drafting
from baton.services.worker.engine_loop import EngineLoop
from baton.services.worker.failpoints import Failpoints
from baton.services.worker.grammars import Grammars
from baton.services.worker.hold import KvServicer
from baton.services.worker.inspection import WorkerServicer
from baton.services.worker.mailroom import Mailroom
from baton.services.worker.metrics import EngineMetrics, WorkerCollector
from baton.services.worker.sealing import Sealer
from baton.services.worker.stepper import BatchLimits
from baton.shared.directory.directory import DirectoryMisconfigured, OtherModel
from baton.shared.directory.workers import ModelFacts, WorkerLoad, WorkerRecord, accepted_at
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_digest import ModelIdentity
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.capability import Capability
from baton.shared.kv.pools import Pools
from baton.shared.rpc.convert import ROLE_TO_PB
from baton.shared.rpc.errors import Draining
from baton.shared.rpc.serve import (
    INTERNAL_MESSAGE_BYTES,
    Endpoint,
    bare_host,
    is_orphaned,
    join_address,
    stop_event,
)
from baton.shared.telemetry import Counters, Trace, baton_version, log_event
from baton.shared.transfer import nixl_agent
from baton.shared.transfer.choose import TransportUnavailable, choose_transport
from baton.shared.transfer.interface import GroupBlocks, KvTransport, LocalPool, TransferError
from baton.shared.transfer.nixl import NixlTransport
from baton.shared.transfer.puller import Puller, PullResult
from baton.shared.transfer.shm import ShmTransport, sweep_stale
from baton.v1 import (
    decode_service_pb2_grpc,
    kv_service_pb2_grpc,
    prefill_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)

logger = logging.getLogger("worker")

_ROLE_SERVICES = {
    "prefill": ["baton.v1.PrefillService", "baton.v1.KvService"],
    "decode": ["baton.v1.DecodeService"],
    "both": ["baton.v1.PrefillService", "baton.v1.DecodeService", "baton.v1.KvService"],
}
_DRAIN_POLL_S = 0.05
_INSPECT_S = 0.2
_STOP_GRACE_S = 0.5
_LARGE_VOCABULARY = 100_000
"""Tokens; reading them takes a second or more."""
_SWITCH_INTERVAL_S = 0.0005
"""How long the engine may keep the streams' thread waiting while it launches kernels."""


class WorkerStartError(Exception):
    """One line: what keeps the worker from starting, and which flag has to do with it."""


class Worker:
    def __init__(
        self,
        args: argparse.Namespace,
        config: EngineConfig,
        *,
        registry: CollectorRegistry,
        ready: threading.Event,
        metrics_address: str | None = None,
    ) -> None:
        """Loads the model and takes the pool's memory; listens nowhere yet.

        `ready` is set while the worker serves; `metrics_address`: where `registry` is read.

        Raises ModelError and WorkerStartError.
        """
        self._args = args
        self._config = config
        self._incarnation = secrets.token_hex(16)
        self._registry = registry
        self._ready = ready
        self._metrics_address = metrics_address
        self._counters = Counters()
        self._failpoints = Failpoints.from_environment()
        self._state = worker_service_pb2.GetWorkerStateResponse()
        name = f"{args.worker_id}-{self._incarnation[:8]}"
        self._trace = Trace(args.trace_dir, name)
        # Of the streams' thread, so that no line of one is within a line of the other.
        self._streams_trace = Trace(args.trace_dir, f"{name}-streams")
        torch.set_num_threads(args.threads)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        sweep_stale(args.shm_dir)
        nixl_agent.set_defaults(bare_host(args.host))
        try:
            choice = choose_transport(
                role=args.role,
                device=config.device,
                transport=args.transport,
                has_cuda=torch.cuda.is_available(),
                why_no_nixl=nixl_agent.available,
            )
        except TransportUnavailable as error:
            raise WorkerStartError(str(error)) from error
        if choice.warning is not None:
            log_event(logger, logging.WARNING, choice.warning)
        shm = ShmTransport(self._incarnation, args.shm_dir) if choice.transport == "shm" else None
        self._transport: KvTransport = shm or NixlTransport(self._incarnation, bare_host(args.host))
        try:
            self._runner = ModelRunner(
                dataclasses.replace(config, device=choice.device),
                pool_memory=shm.allocate if shm is not None and choice.device == "cpu" else None,
                progress=lambda text: log_event(logger, logging.INFO, text),
                on_identity=self._check_model,
            )
        except TransferError as error:
            raise WorkerStartError(f"--shm-dir, --num-blocks: {error}") from error
        except BaseException:
            self._transport.close()
            raise
        speculation = args.speculate
        self._drafting = (
            None if speculation is None else Drafting.of(speculation, self._runner.draft)
        )
        self._grammars = self._load_grammars()
        cache = self._runner.kv_cache
        self._transport_pool = LocalPool(
            memory=cache.memory,
            groups=tuple(
                GroupBlocks(
                    offset_bytes=cache.pool_of(number).offset_bytes,
                    num_blocks=cache.pool_of(number).num_blocks,
                    block_bytes=cache.pool_of(number).block_bytes,
                    num_heads=group.num_pieces,
                )
                for number, group in enumerate(cache.groups)
            ),
            incarnation=self._incarnation,
        )
        try:
            self._transport.bind(self._transport_pool)
        except TransferError as error:
            raise WorkerStartError(f"--transport {choice.transport}: {error}") from error
        self._capability = Capability(
            model_digest=self._runner.model_identity.digest,
            dtype=str(self._runner.dtype).removeprefix("torch."),
            cache_dtype=str(self._runner.cache_dtype).removeprefix("torch."),
            block_size=config.block_size,
            layout=cache.layout(),
            determinism=f"{self._runner.determinism} ({self._runner.numerics})",
        )

    async def run(self) -> int:
        """Serves until a signal; returns the exit status."""
        args, identity = self._args, msg.Peer(self._args.worker_id, self._incarnation, "")
        stop = stop_event()
        endpoint = Endpoint(max_message_bytes=INTERNAL_MESSAGE_BYTES)
        inbox: queue.SimpleQueue[msg.Command] = queue.SimpleQueue()
        directory = DirectorySync(
            args.redis_url, args.cluster, worker_id=args.worker_id, incarnation=self._incarnation
        )

        def on_pulled(result: PullResult) -> None:
            self._failpoints.after_pull()
            inbox.put(msg.Pulled(result))

        puller = Puller(self._transport, self._transport_pool, on_pulled, self._runner.block_sums())
        mailroom = Mailroom(
            identity=identity,
            capability_hash=self._capability.hash(),
            inbox=inbox,
            describe_pool=self._transport.describe,
            drop_peer=puller.drop_peer,
            directory=directory,
            grammars=self._grammars,
            trace=self._streams_trace,
        )
        metrics = EngineMetrics(self._registry)
        engine = self._build_engine(identity, inbox, mailroom, puller, metrics)
        mailroom.engine = engine
        self._register_services(endpoint, mailroom)
        try:
            await directory.connect()
            await endpoint.start(args.host, args.port, _ROLE_SERVICES[args.role])
        except (DirectoryMisconfigured, OSError) as error:
            sys.stderr.write(f"baton worker: {error}\n")
            self._transport.close()
            return 2
        port = int(endpoint.address.rpartition(":")[2])
        address = join_address(args.advertise or args.host, port)
        engine_thread = _start_engine(engine, stop)

        def path_rates() -> dict[str, float]:
            names = mailroom.source_ids()
            return {names.get(name, name): rate for name, rate in puller.rates().items()}

        def record() -> Awaitable[WorkerRecord]:
            return self._record(mailroom, address, metrics, path_rates())

        directory_task = asyncio.create_task(directory.run(record))
        directory_task.add_done_callback(lambda task: _stop_on_failure(task, stop))
        # What is there now stays: with 50,000 blocks, looking through it takes a tenth of a second.
        gc.collect()
        gc.freeze()
        self._export(inbox, metrics, path_rates, directory)
        await _first_of(directory.has_tried, stop)
        was_ready = not stop.is_set()
        if was_ready:
            self._ready.set()
            await endpoint.set_ready(is_ready=True)
            self._announce(address)

        await stop.wait()
        problem = directory_task.exception() if directory_task.done() else None
        has_failed = not engine_thread.is_alive() or problem is not None
        self._ready.clear()
        await endpoint.set_ready(is_ready=False)
        log_event(logger, logging.INFO, "stopping", num_sequences=engine.num_sequences)
        # Another model has taken the cluster over: what began here ends here.
        is_replaced = was_ready and isinstance(problem, OtherModel)
        if (not has_failed or is_replaced) and not is_orphaned():
            await directory.retire()
            await _drain(engine, args.drain_s)
        directory_task.cancel()
        await asyncio.gather(directory_task, return_exceptions=True)
        await directory.close()
        inbox.put(msg.Stop())
        await mailroom.close()
        await endpoint.stop(_STOP_GRACE_S)
        engine_thread.join()
        puller.close()
        self._transport.close()
        if is_orphaned():
            # The launcher's own directory: the last of its workers finds it empty.
            with contextlib.suppress(OSError):
                args.shm_dir.rmdir()
        self._trace.close()
        self._streams_trace.close()
        if problem is not None and not was_ready:
            sys.stderr.write(f"baton worker: {problem}\n")
            return 2
        return 1 if has_failed else 0

    def _load_grammars(self) -> Grammars:
        vocab_size = self._runner.model_config.vocab_size
        if vocab_size > _LARGE_VOCABULARY:
            log_event(logger, logging.INFO, "reading the tokens that constraints are made of")
        return Grammars.load(self._config.model_dir, vocab_size)

    def _check_model(self, identity: ModelIdentity) -> None:
        """Raises WorkerStartError when the cluster has no place for it."""
        args = self._args
        check = check_model(
            args.redis_url, args.cluster, name=args.model_name, digest=identity.digest
        )
        try:
            asyncio.run(check)
        except DirectoryMisconfigured as error:
            raise WorkerStartError(str(error)) from error

    def _build_engine(
        self,
        identity: msg.Peer,
        inbox: queue.SimpleQueue[msg.Command],
        mailroom: Mailroom,
        puller: Puller,
        metrics: EngineMetrics,
    ) -> EngineLoop:
        cache = self._runner.kv_cache
        pools = Pools(cache.groups, self._runner.capacity)
        sealer = Sealer(
            pools,
            cache,
            self._runner.block_sums(),
            self._incarnation,
            self._capability.hash(),
            self._failpoints,
        )
        return EngineLoop(
            self._runner,
            pools,
            sealer,
            identity=identity,
            limits=BatchLimits(
                self._runner.token_budget,
                self._runner.max_num_seqs,
                self._args.tpot_goal_s,
                self._runner.backlog_budget if self._args.role == "prefill" else None,
            ),
            inbox=inbox,
            submit_pull=puller.submit,
            deliver=mailroom.deliver_from_thread,
            failpoints=self._failpoints,
            counters=self._counters,
            trace=self._trace,
            metrics=metrics,
            drafting=self._drafting,
            most_forced=self._runner.most_forced,
        )

    def _export(
        self,
        inbox: queue.SimpleQueue[msg.Command],
        metrics: EngineMetrics,
        path_rates: Callable[[], dict[str, float]],
        directory: DirectorySync,
    ) -> None:
        """From now on scrapes see the engine."""
        about = {
            "version": baton_version(),
            "model_name": self._args.model_name,
            "role": self._args.role,
            "worker_id": self._args.worker_id,
            "incarnation": self._incarnation,
            "device": self._transport_pool.memory.device.type,
            "dtype": self._capability.dtype,
            "determinism": self._capability.determinism,
        }
        collector = WorkerCollector(
            inbox,
            metrics,
            about=about,
            path_rates=path_rates,
            is_directory_reachable=lambda: directory.is_reachable,
            is_draining=lambda: not self._ready.is_set(),
        )
        self._registry.register(collector)

    def _register_services(self, endpoint: Endpoint, mailroom: Mailroom) -> None:
        role = self._args.role
        server = endpoint.server
        if role != "decode":
            prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server(
                PrefillServicer(mailroom), server
            )
            kv_service_pb2_grpc.add_KvServiceServicer_to_server(KvServicer(mailroom), server)
        if role != "prefill":
            decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(
                DecodeServicer(mailroom), server
            )
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(
            WorkerServicer(mailroom, ROLE_TO_PB[role]), server
        )

    async def _record(
        self,
        mailroom: Mailroom,
        address: str,
        metrics: EngineMetrics,
        path_rates: Mapping[str, float],
    ) -> WorkerRecord:
        # A heartbeat must not wait for a long step: the last state is told again then.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_INSPECT_S):
                self._state = await mailroom.inspect(check_integrity=False)
        state, model = self._state, self._runner.model_config
        return WorkerRecord(
            worker_id=self._args.worker_id,
            incarnation=self._incarnation,
            role=self._args.role,
            address=address,
            capability=self._capability,
            model=ModelFacts(
                model_name=self._args.model_name,
                model_type=model.model_type,
                vocab_size=model.vocab_size,
                eos_token_ids=tuple(model.eos_token_ids),
                model_impl=self._runner.model_impl,
                files_stamp=self._runner.model_identity.files_stamp,
                drafter=_drafter(self._args),
            ),
            capacity=self._runner.capacity,
            load=WorkerLoad(
                num_waiting=state.num_waiting,
                num_running=state.num_running,
                # Before the engine has answered once, none.
                num_free_blocks=tuple(state.num_free_blocks_by_pool)
                or (0,) * len(self._runner.num_blocks),
                counters=_counters(state),
                prompt_tokens_per_s=metrics.prompt_tokens_per_s,
                path_bytes_per_s={peer: int(rate) for peer, rate in path_rates.items()},
            ),
        )

    def _announce(self, address: str) -> None:
        log_event(
            logger,
            logging.INFO,
            "worker is ready",
            role=self._args.role,
            num_blocks=sum(self._runner.capacity.num_blocks),
            cache=self._runner.kv_cache.arrangement.describe(),
            block_size=self._config.block_size,
            dtype=self._capability.dtype,
            determinism=self._capability.determinism,
            model_impl=self._runner.model_impl,
            capability=self._capability.hash()[:12],
            speculate=str(self._args.speculate or "none"),
            draft_model=str(self._args.draft_model or "none"),
        )
        metrics = f" metrics={self._metrics_address}" if self._metrics_address else ""
        print(f"READY grpc={address}{metrics}", flush=True)  # noqa: T201


def _drafter(args: argparse.Namespace) -> str:
    """Who guesses, as status tells it: of workers that decode."""
    if args.speculate is None or args.role == "prefill":
        return ""
    model = args.draft_model
    return str(args.speculate) if model is None else f"{args.speculate} of {model.resolve().name}"


def _counters(state: worker_service_pb2.GetWorkerStateResponse) -> dict[str, int]:
    named = {field.name: value for field, value in state.counters.ListFields()}
    if state.num_checkpoints:
        named["num_checkpoints"] = state.num_checkpoints
    by_position = enumerate(state.num_accepted_by_position)
    return named | {accepted_at(place): count for place, count in by_position}


def _start_engine(engine: EngineLoop, stop: asyncio.Event) -> threading.Thread:
    """An engine that dies takes the process with it: its sequences go on elsewhere."""
    loop = asyncio.get_running_loop()

    def run() -> None:
        try:
            engine.run()
        except BaseException:
            log_event(logger, logging.ERROR, "the engine died", exc_info=True)
            loop.call_soon_threadsafe(stop.set)

    thread = threading.Thread(target=run, name="engine", daemon=True)
    thread.start()
    return thread


async def _first_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


def _stop_on_failure(task: asyncio.Task[None], stop: asyncio.Event) -> None:
    if not task.cancelled() and task.exception() is not None:
        log_event(logger, logging.ERROR, "the directory can't be used", message=task.exception())
        stop.set()


async def _drain(engine: EngineLoop, drain_s: float) -> None:
    """Finishes what is here, takes nothing new; what is left in the end goes elsewhere."""
    engine.inbox.put(msg.Drain())
    give_up_at = time.monotonic() + drain_s
    while engine.num_sequences and time.monotonic() < give_up_at and not is_orphaned():
        await asyncio.sleep(_DRAIN_POLL_S)
    engine.inbox.put(msg.FailAll(Draining("the worker is shutting down")))
    # Time for the failures to get out, and for the ledger's last write.
    await asyncio.sleep(2 * _DRAIN_POLL_S)
