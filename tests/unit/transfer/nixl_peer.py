"""Other processes of NIXL's tests: the owner of pools of known bytes, and a reader without end.

They come of one process that has imported what they need and started nothing, so that a test waits
for an agent and not for torch.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from baton.shared.transfer import nixl_agent
from baton.shared.transfer.interface import BlockCopy, GroupBlocks, LocalPool
from baton.shared.transfer.nixl import NixlTransport
from baton.v1.kv_service_pb2 import PoolDescription


def started(work: Any, env: dict[str, str], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """A process that runs `work(connection, env, *arguments)`, and this side's end of the
    connection."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, env, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def own(
    connection: Connection,
    env: dict[str, str],
    incarnation: str,
    seed: int,
    groups: tuple[GroupBlocks, ...],
) -> None:
    """Sends the description of its pools, then answers what it is asked."""
    os.environ.update(env)
    memory = torch.empty(max(group.end_bytes for group in groups), dtype=torch.uint8)
    memory.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    transport = NixlTransport(incarnation)
    transport.bind(LocalPool(memory, groups, incarnation))
    connection.send(transport.describe().SerializeToString())
    while True:
        match connection.recv():
            case "hash":
                connection.send(hashlib.sha256(memory.numpy().tobytes()).hexdigest())
            case "busy":
                connection.send("busy")
                sum(i * i for i in range(10**9))
            case "cpu":
                before = time.process_time()
                time.sleep(0.5)
                connection.send((time.process_time() - before) / 0.5)
            case "close":
                transport.close()
                connection.send("closed")


def say_why_not(connection: Connection, env: dict[str, str]) -> None:
    """Sends why NIXL cannot be used, if so."""
    os.environ.update(env)
    connection.send(nixl_agent.available("cpu"))


def read_without_end(connection: Connection, env: dict[str, str], described: bytes) -> None:
    """The whole of the owner's first group again and again."""
    os.environ.update(env)
    peer = PoolDescription.FromString(described)
    groups = tuple(map(GroupBlocks.of, peer.groups))
    memory = torch.empty(max(group.end_bytes for group in groups), dtype=torch.uint8)
    transport = NixlTransport("beef")
    transport.bind(LocalPool(memory, groups, "beef"))
    reading = transport.connect(peer)
    connection.send("reading")
    while True:
        reading.read(0, [BlockCopy(block, block) for block in range(groups[0].num_blocks)])
