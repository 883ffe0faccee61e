"""`baton status`: how the cluster is, as the gateway sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import grpc

from baton.services.launcher.output import reader_may_leave
from baton.services.launcher.target import connect, report
from baton.shared.rpc.convert import sampling_to_json
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc as pb_grpc
from baton.v1 import types_pb2

_TIMEOUT_S = 10.0
_BY_POSITION = "num_accepted_by_position"
_ROLES = {
    types_pb2.WORKER_ROLE_PREFILL: "prefill",
    types_pb2.WORKER_ROLE_DECODE: "decode",
    types_pb2.WORKER_ROLE_BOTH: "both",
}


def run_status(target: str, *, as_json: bool) -> int:
    """Prints a table, or one object on one line; returns the exit code."""
    try:
        info = asyncio.run(_ask(target))
    except grpc.aio.AioRpcError as error:
        return report(error, target)
    state = to_json(info)
    with reader_may_leave():
        print(json.dumps(state) if as_json else to_text(state))
    return 0


def to_json(info: pb.GetServerInfoResponse) -> dict[str, Any]:
    return {
        "version": info.version,
        "gateway_incarnation": info.gateway_incarnation,
        "model_digest": info.model_digest,
        "directory_reachable": info.directory_reachable,
        "directory_problem": info.directory_problem,
        "workers": [_worker_to_json(worker) for worker in info.workers],
        "ledger": {stage.stage: stage.num_entries for stage in info.ledger},
        "num_prefix_entries": info.num_prefix_entries,
        "counters": _numbers(info.counters),
        "default_sampling": sampling_to_json(info.default_sampling),
    }


def to_text(state: dict[str, Any]) -> str:
    """`state` as `to_json` makes it."""
    directory = "directory answers"
    if not state["directory_reachable"]:
        directory = state["directory_problem"] or "directory cannot be reached"
    lines = [
        f"gateway {state['gateway_incarnation']}, version {state['version']}; {directory}",
        f"model {state['model_digest'] or 'not known yet'}",
        "",
    ]
    names = ("WORKER", "ROLE", "INCARNATION", "HEALTHY", "WAITING", "RUNNING", "FREE BLOCKS")
    rows = [(*names, "LONGEST")]
    for worker in state["workers"]:
        rows.append(
            (
                worker["id"],
                worker["role"],
                worker["incarnation"],
                "yes" if worker["healthy"] else "NO",
                str(worker["num_waiting"]),
                str(worker["num_running"]),
                f"{worker['num_free_blocks']}/{worker['num_blocks']}",
                str(worker["max_model_len"]),
            )
        )
    lines += _table(rows)
    classes = {worker["determinism"] for worker in state["workers"] if worker["determinism"]}
    lines += [f"answers are {each}" for each in sorted(classes)]
    lines += [
        f"{worker['id']} runs the model through {worker['model_impl']}: slower than Baton's own"
        for worker in state["workers"]
        if worker["model_impl"] not in ("", "baton")
    ]
    lines += [
        f"{worker['id']} keeps {worker['num_checkpoints']} states for later prompts"
        for worker in state["workers"]
        if worker["num_checkpoints"]
    ]
    guessing = [worker for worker in state["workers"] if worker["drafter"]]
    lines += [f"{worker['id']} guesses by {worker['drafter']}" for worker in guessing]
    stages = ", ".join(f"{stage} {count}" for stage, count in state["ledger"].items()) or "empty"
    lines += ["", f"ledger: {stages}", f"prefix index: {state['num_prefix_entries']} entries"]
    defaults = ", ".join(f"{name} {value}" for name, value in state["default_sampling"].items())
    lines += [f"sampling defaults of the model: {defaults or 'none'}"]
    lines += [_drafts(state["counters"], is_guessed=bool(guessing)), "counters:"]
    counters = [(name, n) for name, n in state["counters"].items() if name != _BY_POSITION]
    lines += [f"  {line}" for line in _table([(_words(name), str(n)) for name, n in counters])]
    return "\n".join(lines)


async def _ask(target: str) -> pb.GetServerInfoResponse:
    async with connect(target) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        return await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=_TIMEOUT_S)


def _worker_to_json(worker: pb.WorkerStatus) -> dict[str, Any]:
    return {
        "id": worker.worker.worker_id,
        "role": _ROLES.get(worker.role, "unknown"),
        "incarnation": worker.worker.incarnation,
        "address": worker.worker.address,
        "healthy": worker.healthy,
        "num_waiting": worker.num_waiting,
        "num_running": worker.num_running,
        "num_free_blocks": worker.num_free_blocks,
        "num_blocks": worker.num_blocks,
        "capability_hash": worker.capability_hash,
        "determinism": worker.determinism,
        "max_model_len": worker.max_model_len,
        "model_impl": worker.model_impl,
        "num_checkpoints": worker.num_checkpoints,
        "drafter": worker.drafter,
    }


def _numbers(counters: pb.ServerCounters) -> dict[str, Any]:
    numbers = {field.name: getattr(counters, field.name) for field in counters.DESCRIPTOR.fields}
    return numbers | {_BY_POSITION: list(counters.num_accepted_by_position)}


def _drafts(counters: dict[str, Any], *, is_guessed: bool) -> str:
    """How far chains of drafts go, one line."""
    num_drafts = counters["num_drafts"]
    if not num_drafts:
        return "drafts: none checked yet" if is_guessed else "drafts: none"
    mean = 1 + counters["num_accepted_tokens"] / num_drafts
    shares = [f"{count / num_drafts:.0%}" for count in counters[_BY_POSITION]]
    return f"drafts: {mean:.2f} tokens a step on average; accepted by position {', '.join(shares)}"


def _words(name: str) -> str:
    """`num_digest_mismatches` → `digest mismatches`."""
    return name.removeprefix("num_").replace("_", " ")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
