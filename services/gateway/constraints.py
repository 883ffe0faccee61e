"""Whether constraints can be compiled, found out beside the gateway's loop, in bounded time and
memory (compiler_process.py, constraint_check.py). Workers compile only what has passed.

    check ─► its size ─► known? ─► under way? ─► a free process ─► known, if it is a verdict
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from pathlib import Path

from baton.services.gateway.compiler_process import CompilerProcess
from baton.shared.constraints.size import check_size
from baton.shared.rpc.errors import BatonError, Overloaded, from_failure, to_failure
from baton.v1 import error_details_pb2, types_pb2

_NUM_PROCESSES = 2
_MAX_KNOWN = 1024
_MAX_UNDER_WAY = 256
"""Different ones, compiled and waiting. Each may take seconds."""

_Verdict = error_details_pb2.Failure | None


class ConstraintChecker:
    """Starts its processes when the first constraints come."""

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        # By SHA-256: what is refused may be as large as what is not.
        self._known: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._under_way: dict[bytes, _Check] = {}
        self._free: asyncio.LifoQueue[CompilerProcess] = asyncio.LifoQueue()
        self._processes = [CompilerProcess(model_dir, vocab_size) for _ in range(_NUM_PROCESSES)]
        for process in self._processes:
            self._free.put_nowait(process)

    async def check(self, constraint: types_pb2.Constraint) -> None:
        """Raises InvalidField, naming field and place; NoTokenizer; Overloaded and EngineFailure,
        which say nothing about the constraint."""
        check_size(constraint)
        message = constraint.SerializeToString(deterministic=True)
        digest = hashlib.sha256(message).digest()
        if digest in self._known:
            self._known.move_to_end(digest)
            verdict = self._known[digest]
        else:
            verdict = await self._verdict(digest, message, constraint.WhichOneof("kind") or "")
        if verdict is not None:
            raise from_failure(verdict)

    async def close(self) -> None:
        tasks = [check.task for check in self._under_way.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in self._processes:
            await process.end()

    async def _verdict(self, digest: bytes, message: bytes, kind: str) -> _Verdict:
        """All who ask for the same wait for the same."""
        check = self._under_way.get(digest)
        if check is None:
            if len(self._under_way) >= _MAX_UNDER_WAY:
                raise Overloaded(
                    f"{_MAX_UNDER_WAY} other constraints are being compiled: try later"
                )
            check = self._under_way[digest] = _Check()
            check.task = asyncio.create_task(self._run(check, digest, message, kind))
        check.num_asking += 1
        try:
            # What has begun goes on without them: it ends soon, and its process need not.
            return await asyncio.shield(check.task)
        finally:
            check.num_asking -= 1
            if not check.num_asking and not check.has_begun:
                self._forget(digest, check)
                check.task.cancel()

    async def _run(self, check: _Check, digest: bytes, message: bytes, kind: str) -> _Verdict:
        try:
            process = await self._free.get()
            check.has_begun = True
            try:
                error = await process.ask(message, kind)
            finally:
                self._free.put_nowait(process)
            verdict = None if error is None else to_failure(error)
            self._known[digest] = verdict
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
            return verdict
        except BatonError:
            if not check.num_asking:
                # Nobody is left to whom it could be told.
                return None
            raise
        finally:
            self._forget(digest, check)

    def _forget(self, digest: bytes, check: _Check) -> None:
        if self._under_way.get(digest) is check:
            del self._under_way[digest]


class _Check:
    """Of one constraint, for all who ask for it."""

    task: asyncio.Task[_Verdict]
    num_asking = 0
    has_begun = False
