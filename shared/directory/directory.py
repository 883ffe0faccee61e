"""The directory: who is alive, who holds which prefix, who owns the blocks of which request.

All of it are hints and records; the process that hosts the memory decides. Every call may raise
`DirectoryUnavailable`, within half a second; the caller goes on with what it knows.
"""

from __future__ import annotations

from baton.shared.directory.cluster_model import OtherModel
from baton.shared.directory.connection import (
    Connection,
    DirectoryMisconfigured,
    DirectoryRefused,
    DirectoryUnavailable,
)
from baton.shared.directory.keys import Keys
from baton.shared.directory.ledger import LEDGER_SCRIPTS, Ledger
from baton.shared.directory.prefix_index import PREFIX_SCRIPTS, PrefixIndex
from baton.shared.directory.workers import WORKER_SCRIPTS, WorkerRegistry

__all__ = [
    "Directory",
    "DirectoryMisconfigured",
    "DirectoryRefused",
    "DirectoryUnavailable",
    "OtherModel",
    "open_directory",
]


async def open_directory(url: str, cluster: str = "default") -> Directory:
    """Connects and checks the server's policy.

    `DirectoryUnavailable` when it cannot be reached: try again later. `DirectoryMisconfigured`
    for a URL, cluster name or server that will not do.
    """
    try:
        keys = Keys(cluster)
    except ValueError as error:
        raise DirectoryMisconfigured(str(error)) from None
    connection = Connection(url, [*WORKER_SCRIPTS, *PREFIX_SCRIPTS, *LEDGER_SCRIPTS])
    directory = Directory(connection, keys)
    try:
        await directory.check_policy()
    except BaseException:
        await directory.aclose()
        raise
    return directory


class Directory:
    """One cluster's directory on one server. Belongs to the event loop that opened it."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self.workers = WorkerRegistry(connection, keys)
        self.prefix_index = PrefixIndex(connection, keys)
        self.ledger = Ledger(connection, keys)

    async def ping(self) -> None:
        await self._connection.execute([("PING",)])

    async def check_policy(self) -> None:
        """`DirectoryMisconfigured` when the server would evict entries before their TTL."""
        # INFO, because hosted servers often refuse CONFIG.
        [memory] = await self._connection.execute([("INFO", "memory")])
        limit = int(memory["maxmemory"])
        policy = memory["maxmemory_policy"]
        if limit > 0 and policy != "noeviction":
            raise DirectoryMisconfigured(
                f"redis evicts keys: maxmemory-policy is {policy} with maxmemory {limit}; "
                "set maxmemory-policy to noeviction"
            )

    async def age_s(self) -> int:
        """Since the server was started, in whole seconds."""
        [server] = await self._connection.execute([("INFO", "server")])
        return int(server["uptime_in_seconds"])

    async def aclose(self) -> None:
        await self._connection.aclose()
