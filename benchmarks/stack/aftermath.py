"""What a run leaves behind: blocks, claims, ledger entries, memory."""

from __future__ import annotations

import asyncio
import subprocess
import time

from baton.shared.rpc.serve import internal_channel
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc as pb_grpc
from baton.v1 import worker_service_pb2, worker_service_pb2_grpc
from benchmarks.stack.launched import BenchmarkStack, private_mib

_IDLE_S = 30.0
_POLL_S = 0.2
_RPC_S = 10.0
_HOST_GROWTH = 1.05
_HOST_SLACK_MIB = 64.0
_GPU_SLACK_MIB = 256.0


async def leftovers(stack: BenchmarkStack) -> dict[str, str]:
    """Condition → what is wrong with it, empty for nothing; waits a while for it to become so."""
    give_up_at = time.monotonic() + _IDLE_S
    while True:
        found = await _leftovers(stack)
        if not any(found.values()) or time.monotonic() > give_up_at:
            return found
        await asyncio.sleep(_POLL_S)


async def _leftovers(stack: BenchmarkStack) -> dict[str, str]:
    blocks, claims, busy, integrity, digests = [], [], [], [], []
    for worker in stack.workers:
        name, address = worker.spec.name, worker.address
        if address is None:
            busy.append(f"{name} is not there")
            continue
        state = await _state(address)
        if state.num_free_blocks != state.num_blocks or state.num_quarantined_blocks:
            blocks.append(
                f"{name}: {state.num_free_blocks} of {state.num_blocks} free or cached,"
                f" {state.num_quarantined_blocks} in quarantine"
            )
        if state.num_claims:
            claims.append(f"{name}: {state.num_claims}")
        if state.num_waiting or state.num_running:
            busy.append(f"{name}: {state.num_waiting} waiting, {state.num_running} running")
        if state.integrity_error:
            integrity.append(f"{name}: {state.integrity_error}")
        if state.counters.num_digest_mismatches:
            digests.append(f"{name}: {state.counters.num_digest_mismatches}")
    ledger = {stage: count for stage, count in (await _ledger(stack.address)).items() if count}
    return {
        "every block is free or cached": "; ".join(blocks),
        "no claim is left": "; ".join(claims),
        "no sequence is left": "; ".join(busy),
        "the pools are whole": "; ".join(integrity),
        "no digest differed": "; ".join(digests),
        "the ledger is empty": str(ledger) if ledger else "",
    }


async def _state(address: str) -> worker_service_pb2.GetWorkerStateResponse:
    async with internal_channel(address) as channel:
        stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
        request = worker_service_pb2.GetWorkerStateRequest(check_integrity=True)
        return await stub.GetWorkerState(request, timeout=_RPC_S)


async def _ledger(address: str) -> dict[str, int]:
    async with internal_channel(address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        info = await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=_RPC_S)
        return {count.stage: count.num_entries for count in info.ledger}


class MemoryWatch:
    """Memory of the stack's processes and of the GPUs, in MiB, from look to look.

    Of a process what is its own: a pool in shared memory fills as its blocks are first used.
    """

    def __init__(self, stack: BenchmarkStack) -> None:
        self._stack = stack
        self._seen: dict[str, list[float]] = {}
        self._pids: dict[str, int] = {}

    def look(self) -> None:
        for name, pid in self._stack.pids().items():
            if self._pids.get(name, pid) != pid:
                # A restarted one starts anew.
                self._seen[name] = []
            self._pids[name] = pid
            self._seen.setdefault(name, []).append(private_mib(pid))
        for index, size in enumerate(_gpu_mib()):
            self._seen.setdefault(f"gpu{index}", []).append(size)

    def last(self) -> dict[str, float]:
        return {name: sizes[-1] for name, sizes in self._seen.items() if sizes}

    def summary(self) -> dict[str, dict[str, float]]:
        """`middle` and `end` are the most in the second and the last third."""
        return {
            name: {
                "first": round(sizes[0], 1),
                "last": round(sizes[-1], 1),
                "max": round(max(sizes), 1),
                "middle": round(_middle(sizes), 1),
                "end": round(_end(sizes), 1),
                "num_looks": len(sizes),
            }
            for name, sizes in self._seen.items()
            if sizes
        }

    def growth(self) -> str:
        """Who had more in its last third than in its second, by more than noise; empty for nobody.

        In the first third caches fill: of compiled kernels, of the allocator, of shapes seen.
        """
        return "; ".join(
            f"{name}: {_middle(sizes):.0f} to {_end(sizes):.0f} MiB"
            for name, sizes in self._seen.items()
            if sizes and _end(sizes) > _limit(name, _middle(sizes))
        )


def _middle(sizes: list[float]) -> float:
    third = len(sizes) // 3
    return max(sizes[third : len(sizes) - third] or sizes)


def _end(sizes: list[float]) -> float:
    return max(sizes[-max(1, len(sizes) // 3) :])


def _limit(name: str, before: float) -> float:
    if name.startswith("gpu"):
        return before + _GPU_SLACK_MIB
    return max(before * _HOST_GROWTH, before + _HOST_SLACK_MIB)


def _gpu_mib() -> list[float]:
    """By index; none without GPUs."""
    query = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [float(line) for line in lines.split()]
