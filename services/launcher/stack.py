"""The whole stack on this machine: what is started when, and what is stopped when.

    Valkey ─> workers ─> (one is ready) ─> gateways ─> (a request was answered) ─> ready
    gateways drain ─> workers ─> Valkey

Gateways come after the first worker, so that nothing listens on the public ports before a model has
been loaded; of several, the first one picks the ports that the others share.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, overload

from baton.services.launcher.first_answer import until_answered
from baton.services.launcher.memory_share import worker_share_mib
from baton.services.launcher.role_log import RoleLog
from baton.services.launcher.role_process import Notice, RoleProcess
from baton.services.launcher.roles import RoleSpec, StackConfig, gateway_specs, worker_specs
from baton.shared.directory.embedded import EmbeddedValkey, ServerFailed
from baton.shared.engine.host_memory import host_memory
from baton.shared.rpc.flags import variable_name

_VALKEY_CHECK_S = 0.5
_WORKER_STOP_LIMIT_S = 10.0
# Beyond the time that the gateway was given for its streams.
_GATEWAY_STOP_MARGIN_S = 5.0


class Stack:
    def __init__(
        self,
        config: StackConfig,
        shm_dir: Path,
        *,
        emit: Callable[[str], None],
        notice: Notice,
    ) -> None:
        """`emit` gets the roles' lines, `notice` the launcher's own."""
        self.workers: list[RoleProcess] = []
        self.gateways: list[RoleProcess] = []
        self.http_address: str | None = None
        """Of the OpenAI endpoint, once started, if there is one."""
        self._config = config
        self._shm_dir = shm_dir
        self._emit = emit
        self._notice = notice
        self._is_ready = False
        self._is_muted = False
        self._valkey: EmbeddedValkey | None = None
        self._valkey_keeper: asyncio.Task[None] | None = None
        self._logs: list[RoleLog] = []

    async def start(self) -> str:
        """The gateways' address, once a request has been answered.

        Raises Misconfigured, NeverReady, and ServerMissing or ServerFailed for the embedded Valkey.
        """
        shared_out = _with_shares(self._config, os.environ)
        redis_url = self._config.redis_url or self._start_valkey()
        for spec in worker_specs(shared_out, redis_url, self._shm_dir):
            self.workers.append(self._add(spec))
        if self.workers:
            await self._while_all_run(_any_ready(self.workers))

        address = await self._start_gateways(redis_url)
        await self._while_all_run(until_answered(address, self.http_address, self._say))
        self._is_ready = True
        return address

    async def _start_gateways(self, redis_url: str) -> str:
        """Their address, once all listen there."""
        config = self._config
        first = self._add(gateway_specs(config, redis_url, config.port, config.http_port)[0])
        self.gateways.append(first)
        await self._while_all_run(first.was_ready.wait())
        # A gateway that is restarted must be where clients know it to be.
        address, self.http_address = first.addresses["grpc"], first.addresses.get("http")
        specs = gateway_specs(config, redis_url, _port(address), _port(self.http_address))
        first.spec = specs[0]
        self.gateways += [self._add(spec) for spec in specs[1:]]
        for gateway in self.gateways:
            await self._while_all_run(gateway.was_ready.wait())
        return address

    async def watch(self) -> None:
        """Starts roles again that die. Raises nothing but what is a bug of the launcher."""
        await self._while_all_run(asyncio.Event().wait())

    async def stop(self) -> None:
        """Drains, in order; leaves nothing running."""
        try:
            limit_s = self._config.drain_s + _GATEWAY_STOP_MARGIN_S
            await asyncio.gather(*(gateway.stop(limit_s) for gateway in self.gateways))
            await asyncio.gather(*(worker.stop(_WORKER_STOP_LIMIT_S) for worker in self.workers))
        finally:
            if self._valkey_keeper is not None:
                self._valkey_keeper.cancel()
            if self._valkey is not None:
                self._valkey.close()

    def kill(self) -> None:
        """Makes a `stop` under way end at once."""
        for role in self._roles():
            role.kill()

    def mute(self) -> None:
        """Say nothing more about roles: what they do now is of no interest."""
        self._is_muted = True
        for log in self._logs:
            log.mute()

    def _roles(self) -> list[RoleProcess]:
        return self.workers + self.gateways

    def _say(self, line: str) -> None:
        if not self._is_muted:
            self._notice(line)

    def _start_valkey(self) -> str:
        self._valkey = EmbeddedValkey()
        self._valkey.start()
        self._valkey_keeper = asyncio.create_task(self._keep_valkey(self._valkey))
        return self._valkey.url

    async def _keep_valkey(self, valkey: EmbeddedValkey) -> None:
        while True:
            await asyncio.sleep(_VALKEY_CHECK_S)
            if not valkey.is_running():
                self._say("valkey died; starting it again")
                try:
                    valkey.start()
                except ServerFailed as error:
                    self._say(str(error))

    def _add(self, spec: RoleSpec) -> RoleProcess:
        log = RoleLog(spec.name, self._emit)
        self._logs.append(log)
        return RoleProcess(spec, log=log, notice=self._say, stack_was_ready=lambda: self._is_ready)

    async def _while_all_run(self, condition: Coroutine[Any, Any, object]) -> None:
        """Waits for `condition`, or raises what ended a role for good."""
        waiting = asyncio.ensure_future(condition)
        try:
            roles = [role.task for role in self._roles()]
            done, _ = await asyncio.wait([waiting, *roles], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            waiting.cancel()


def _with_shares(config: StackConfig, environ: Mapping[str, str]) -> StackConfig:
    """Each worker gets its share of the memory, unless the environment names one for all."""
    if environ.get(variable_name("--host-memory-mib")):
        return config
    share_mib = worker_share_mib(
        host_memory().free_bytes,
        num_workers=sum(count for _, count in config.counts),
        num_gateways=config.num_gateways,
    )
    return dataclasses.replace(config, host_memory_mib=share_mib)


@overload
def _port(address: str) -> int: ...
@overload
def _port(address: None) -> None: ...
def _port(address: str | None) -> int | None:
    return None if address is None else int(address.rpartition(":")[2])


async def _any_ready(roles: list[RoleProcess]) -> None:
    waiting = [asyncio.ensure_future(role.was_ready.wait()) for role in roles]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
