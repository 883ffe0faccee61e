"""A compose project on this machine's engine, as a user would start it: commands, containers."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_COMPOSE = (["docker", "compose"], ["docker-compose"])
_LABEL = "com.docker.compose"
_COMMAND_LIMIT_S = 1800.0
"""For the slowest command, a build that downloads torch."""


class EngineMissing(Exception):
    """There is nothing here to run containers with; one line."""


class CommandFailed(Exception):
    """What was run, and the end of what it said."""


@dataclass(frozen=True)
class Container:
    id: str
    """The whole of it; its first twelve digits are the container's host name."""
    service: str
    details: dict[str, Any]
    """What `docker inspect` says."""

    @property
    def host_name(self) -> str:
        return self.id[:12]

    @property
    def is_healthy(self) -> bool:
        state = self.details["State"]
        return bool(state["Running"]) and state["Health"]["Status"] == "healthy"

    @property
    def exit_code(self) -> int:
        return int(self.details["State"]["ExitCode"])

    @property
    def num_restarts(self) -> int:
        """By the restart policy."""
        return int(self.details["RestartCount"])

    @property
    def published(self) -> dict[str, str]:
        """`8000/tcp` → `127.0.0.1:32768`."""
        ports = self.details["NetworkSettings"]["Ports"]
        return {
            inside: f"{outside[0]['HostIp']}:{outside[0]['HostPort']}"
            for inside, outside in ports.items()
            if outside
        }


class Project:
    """`compose.yaml` of this tree under a name of its own; `environment` beside the process's.

    COMPOSE_FILE and all that compose.yaml reads from the environment count. Raises EngineMissing.
    """

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self.environment = {**os.environ, **environment}
        self._compose = [*_compose_command(self.environment), "--project-name", name]

    def compose(self, *arguments: str) -> str:
        """Runs it to its end; what it wrote to standard output. Raises CommandFailed."""
        return _run([*self._compose, *arguments], self.environment)

    def docker(self, *arguments: str) -> str:
        """The same with the engine's own command."""
        return _run(["docker", *arguments], self.environment)

    def containers(self, *services: str) -> list[Container]:
        """Those that there are, stopped ones too; of all services unless some are named."""
        ids = self.docker("ps", "-aq", "--filter", f"label={_LABEL}.project={self.name}").split()
        if not ids:
            return []
        found = [
            Container(details["Id"], details["Config"]["Labels"][f"{_LABEL}.service"], details)
            for details in json.loads(self.docker("inspect", *ids))
        ]
        return [container for container in found if not services or container.service in services]

    def leftovers(self) -> list[str]:
        """Whatever the engine still has of this project."""
        label = f"label={_LABEL}.project={self.name}"
        kinds: Sequence[Sequence[str]] = (["ps", "-aq"], ["network", "ls", "-q"])
        return [
            item
            for kind in (*kinds, ["volume", "ls", "-q"])
            for item in self.docker(*kind, "--filter", label).split()
        ]

    def wait_healthy(self, limit_s: float, **counts: int) -> None:
        """Until there are as many healthy containers of each service as `counts` says."""

        def is_reached() -> bool:
            healthy = [c.service for c in self.containers() if c.is_healthy]
            return all(healthy.count(service) == count for service, count in counts.items())

        wait_until(is_reached, limit_s, f"healthy containers: {counts}")


def wait_until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Raises TimeoutError, which says `what`."""
    give_up_at = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"not in {limit_s:.0f} s: {what}")
        time.sleep(0.2)


def _compose_command(environment: Mapping[str, str]) -> list[str]:
    try:
        _run(["docker", "version"], environment)
    except (OSError, CommandFailed) as error:
        reason = str(error).strip().splitlines()[-1]
        raise EngineMissing(f"no Docker engine answers: {reason}") from None
    for command in _COMPOSE:
        try:
            _run([*command, "version"], environment)
        except (OSError, CommandFailed):
            continue
        return command
    raise EngineMissing("neither `docker compose` nor `docker-compose` runs")


def _run(command: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_COMMAND_LIMIT_S,
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise CommandFailed(f"{' '.join(command)}: exit code {done.returncode}\n{tail}")
    return done.stdout
