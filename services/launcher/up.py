"""`baton up`: all roles on this machine, until a signal."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from baton.services.launcher.output import reader_may_leave
from baton.services.launcher.policy import EXIT_MISCONFIGURED
from baton.services.launcher.private_dir import private_dir, shared_memory_root
from baton.services.launcher.role_process import Misconfigured, NeverReady
from baton.services.launcher.roles import StackConfig, UsageError
from baton.services.launcher.stack import Stack
from baton.shared.directory.embedded import ServerFailed, ServerMissing
from baton.shared.log_output import LogOutput
from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.info import load_model_info
from baton.shared.rpc.serve import bare_host, join_address

_stderr = LogOutput(
    lambda: sys.stderr, lambda num_lines: f"baton: {num_lines} lines were lost: nobody took them"
)

# Starts the stack and uses it. When it returns, the stack is stopped; it returns the exit code.
Serve = Callable[[Stack], Awaitable[int]]


def run_up(config: StackConfig) -> int:
    async def serve(stack: Stack) -> int:
        address = await stack.start()
        http = "" if stack.http_address is None else f" http={stack.http_address}"
        _say_ready(f"READY grpc={address}{http}")
        await stack.watch()
        return 0

    return run_stack(config, serve, emit=to_stderr, notice=notice_to_stderr)


def run_stack(
    config: StackConfig,
    serve: Serve,
    *,
    emit: Callable[[str], None],
    notice: Callable[[str], None],
) -> int:
    """Hands a stack to `serve`, until that ends or a signal comes; returns the exit code."""
    try:
        check(config)
    except (ModelError, UsageError) as error:
        notice_to_stderr(str(error))
        return EXIT_MISCONFIGURED
    with private_dir(shared_memory_root()) as shm_dir:
        return asyncio.run(_run(config, shm_dir, serve, emit=emit, notice=notice))


def check(config: StackConfig) -> None:
    """Finds what is wrong before any process is started. Raises ModelError, UsageError."""
    config.check()
    load_model_info(config.model_dir)
    _check_port("--port", config.host, config.port)
    if config.http_port is not None:
        _check_port("--http-port", config.host, config.http_port)
        if config.http_port and config.http_port == config.port:
            raise UsageError(f"--port and --http-port are both {config.port}")


async def _run(
    config: StackConfig,
    shm_dir: Path,
    serve: Serve,
    *,
    emit: Callable[[str], None],
    notice: Callable[[str], None],
) -> int:
    stack = Stack(config, shm_dir, emit=emit, notice=notice)
    signals = _Signals(stack)
    signals.install()
    work = asyncio.ensure_future(serve(stack))
    stopped = asyncio.create_task(signals.first.wait())
    try:
        await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
        code = work.result() if work.done() else 0
    except Misconfigured as error:
        stack.mute()
        to_stderr(str(error))
        code = EXIT_MISCONFIGURED
    except NeverReady as error:
        stack.mute()
        notice_to_stderr(str(error))
        code = 1
    except ServerMissing as error:
        notice_to_stderr(str(error))
        code = EXIT_MISCONFIGURED
    except ServerFailed as error:
        notice_to_stderr(str(error))
        code = 1
    finally:
        work.cancel()
        stopped.cancel()
        await asyncio.gather(work, stopped, return_exceptions=True)
        await stack.stop()
    return signals.exit_code(code)


@dataclass
class _Signals:
    """The first signal drains; one more kills."""

    stack: Stack
    first: asyncio.Event = field(default_factory=asyncio.Event)
    killed_by: signal.Signals | None = None

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def exit_code(self, code: int) -> int:
        return code if self.killed_by is None else 128 + self.killed_by

    def _on_signal(self, number: signal.Signals) -> None:
        if not self.first.is_set():
            self.first.set()
            return
        self.killed_by = number
        self.stack.kill()


def _check_port(flag: str, host: str, port: int) -> None:
    """Raises UsageError when the port is taken. Servers that share ports would share it silently,
    and requests would go to either."""
    try:
        [(family, kind, protocol, _, socket_address), *_] = socket.getaddrinfo(
            bare_host(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind, protocol) as probe:
            # Connections left by a server that has ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(socket_address)
    except OSError as error:
        where = join_address(host, port)
        raise UsageError(f"cannot listen on {where} ({flag}): {error.strerror}") from None


def _say_ready(line: str) -> None:
    # Who started it may wait for READY elsewhere.
    with reader_may_leave():
        print(line)


def to_stderr(line: str) -> None:
    """Never waits for who reads it: roles' lines come this way."""
    _stderr.write(line)


def notice_to_stderr(line: str) -> None:
    to_stderr(f"baton: {line}")
