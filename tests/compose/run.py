"""`make compose-test`: the containers under a real engine, from the build to the last volume.

Needs a Docker engine, `docker compose` or docker-compose, and room for the image. Takes ports and a
project name of its own, so that it disturbs nothing else, and leaves nothing behind but the image.
Exit codes: 0 all well, 1 a step failed, 2 nothing here to run containers with.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from baton.v1.inference_service_pb2 import WorkerStatus
from tests.compose.client import Client
from tests.compose.project import ROOT, CommandFailed, EngineMissing, Project, wait_until
from tests.e2e.harness import Result

WORKERS = ("prefill", "decode")
PROMPTS = [
    "In the beginning",
    "And it came to pass",
    "The king said",
    "Now therefore",
    "Blessed are",
    "Behold, the days come",
    "And he answered",
    "These are the names",
]
PROMPT = PROMPTS[0]
NUM_TOKENS = 300
"""Long enough to do something to a container before the answer is through."""
START_LIMIT_S = 300.0
OTHER_MODEL = "another-name"


class Failed(Exception):
    """What was expected, and what was seen."""


class Steps:
    """The test, step by step; each returns what it saw, in a few words."""

    def __init__(self, project: Project, other_model: Path) -> None:
        self._project = project
        self._other_model = other_model
        self._undisturbed: list[list[int]] = []

    def run(self) -> None:
        """Raises what the first step that fails raises."""
        for step in (
            self.build,
            self.look_at_image,
            self.start,
            self.look_at_containers,
            self.ask,
            self.scale_up,
            self.kill_worker,
            self.crash_worker,
            self.restart_services,
            self.scale_down,
            self.mount_model,
            self.stop,
        ):
            timed(step.__name__.replace("_", " "), step)

    def build(self) -> str:
        self._project.compose("build", "gateway")
        size = self._project.docker("image", "inspect", "-f", "{{.Size}}", self._image())
        return f"{self._image()}, {int(size) / 1e6:.0f} MB"

    def look_at_image(self) -> str:
        """The image of the CPU: no root, no compiler, no installer."""
        script = "id -u; for program in gcc cc c++ pip pip3 python; do command -v $program; done"
        seen = self._project.docker(
            *("run", "--rm", "--network", "none", "--read-only", self._image()),
            *("sh", "-c", script),
        ).split()
        check(seen[0] != "0", f"the user is not root: {seen}")
        check(seen[1:] == ["/opt/baton/bin/python"], f"nothing but Python: {seen[1:]}")
        return f"user {seen[0]}, no compiler, no pip"

    def start(self) -> str:
        self._project.compose("up", "-d", "--no-build")
        self._project.wait_healthy(START_LIMIT_S, redis=1, prefill=1, decode=1, gateway=1)
        return "redis, prefill, decode, gateway are healthy"

    def look_at_containers(self) -> str:
        published = {c.service: c.published for c in self._project.containers() if c.published}
        check(set(published) == {"gateway"}, f"only the gateway is published: {published}")
        for container in self._project.containers("gateway", *WORKERS):
            host = container.details["HostConfig"]
            check(host["ReadonlyRootfs"], f"{container.service}: the root is read-only")
            check(host["CapDrop"] == ["ALL"], f"{container.service}: no capabilities")
        started = {c.service: c.details["State"]["StartedAt"] for c in self._project.containers()}
        check(
            started["redis"] < min(started[role] for role in WORKERS) < started["gateway"],
            f"redis before the workers before the gateway: {started}",
        )
        for role in WORKERS:
            check(not self._passes_without_anybody(role), f"{role}: a check of nobody fails")
        return f"only the gateway is published: {published['gateway']}"

    def _passes_without_anybody(self, role: str) -> bool:
        """What the container's own check says of a port where nobody listens."""
        try:
            self._project.compose("exec", "-T", role, "baton", "health", "127.0.0.1:1")
        except CommandFailed:
            return False
        return True

    def ask(self) -> str:
        with self._client() as client:
            answer = client.generate(PROMPT, 24)
            texts = {
                answer.text,
                client.complete(PROMPT, 24, stream=False),
                client.complete(PROMPT, 24, stream=True),
            }
            check(texts == {answer.text}, f"the same text over gRPC and HTTP: {texts}")
            client.get("/health")
            check("baton_" in client.get("/metrics"), "the gateway tells its metrics")
            first, second = (
                [result.token_ids for result in self._answers(client, lambda: None)]
                for _ in range(2)
            )
            self._undisturbed = first
            check(first == second, "greedy answers are the same each time")
        return f"gRPC and HTTP, streamed and whole: {PROMPT + answer.text[:32]!r}..."

    def scale_up(self) -> str:
        self._scale(prefill=2, decode=2)
        self._wait_registered(4)
        names = [worker.worker.worker_id for worker in self._server_info_workers()]
        return ", ".join(sorted(names))

    def kill_worker(self) -> str:
        """SIGKILL in mid-stream. The engine does not start again what was killed by its name."""
        victim = self._project.containers("decode")[0]

        def kill() -> None:
            self._project.docker("kill", victim.id)

        with self._client() as client:
            results = self._answers(client, kill)
        num_moved = sum(result.attempts > 1 for result in results)
        check(num_moved > 0, "some answers were on the worker that was killed")
        self._check_undisturbed(results)
        self._project.docker("start", victim.id)
        self._project.wait_healthy(START_LIMIT_S, decode=2)
        self._wait_registered(4)
        return (
            f"{len(results)} answers of {NUM_TOKENS} tokens, {num_moved} moved to another worker,"
            " every token as undisturbed"
        )

    def crash_worker(self) -> str:
        """The process dies by itself: the restart policy brings it back under its old name."""
        victim = self._project.containers("decode")[1]
        name = f"decode-{victim.host_name}"
        before = self._incarnation(name)

        def crash() -> None:
            # -1: all but the container's init, which ends with the last of them.
            self._project.docker("exec", victim.id, "sh", "-c", "kill -9 -1")

        with self._client() as client:
            results = self._answers(client, crash)
        self._check_undisturbed(results)
        wait_until(
            lambda: self._incarnation(name) not in ("", before), START_LIMIT_S, f"{name} is back"
        )
        self._project.wait_healthy(START_LIMIT_S, decode=2)
        [again] = [c for c in self._project.containers("decode") if c.id == victim.id]
        check(again.num_restarts == 1, f"restarted once: {again.num_restarts}")
        return f"{name} restarted by the engine, every token as undisturbed"

    def restart_services(self) -> str:
        """All of one role at once, in mid-stream: prompts wait, nothing fails."""
        seen = []
        for service in ("redis", *WORKERS):
            began_s = time.monotonic()
            with self._client() as client:
                results = self._answers(client, lambda s=service: self._restart(s))  # type: ignore[misc]
                self._check_undisturbed(results)
                self._check_undisturbed(self._answers(client, lambda: None))
            self._project.wait_healthy(START_LIMIT_S, redis=1, prefill=2, decode=2, gateway=1)
            self._wait_registered(4)
            seen.append(f"{service} {time.monotonic() - began_s:.0f} s")
        return f"{', '.join(seen)}; every token as undisturbed"

    def scale_down(self) -> str:
        self._scale(prefill=1, decode=1)
        self._wait_registered(2)
        with self._client() as client:
            self._check_undisturbed(self._answers(client, lambda: None))
        return "one prefill, one decode, the same answers"

    def mount_model(self) -> str:
        self._project.environment["MODEL"] = str(self._other_model)
        self._project.compose("up", "-d", "--no-build")
        self._project.wait_healthy(START_LIMIT_S, redis=1, prefill=1, decode=1, gateway=1)
        with self._client() as client:
            name = client.model_name()
            self._check_undisturbed(self._answers(client, lambda: None))
        check(name == OTHER_MODEL, f"the mounted model is served: {name}")
        return f"MODEL={self._other_model} is served as {name}"

    def stop(self) -> str:
        self._project.compose("stop")
        codes = {c.service: c.exit_code for c in self._project.containers("gateway", *WORKERS)}
        check(not any(codes.values()), f"SIGTERM ends every role with 0: {codes}")
        return "gateway, prefill, decode exited with 0"

    def _answers(self, client: Client, meanwhile: Callable[[], object]) -> list[Result]:
        return client.generate_at_once(PROMPTS, NUM_TOKENS, meanwhile)

    def _check_undisturbed(self, results: list[Result]) -> None:
        for result, expected in zip(results, self._undisturbed, strict=True):
            check(
                result.token_ids == expected,
                f"tokens as undisturbed: {result.token_ids} instead of {expected}",
            )

    def _client(self) -> Client:
        [gateway] = self._project.containers("gateway")
        return Client(gateway.published["50051/tcp"], gateway.published["8000/tcp"])

    def _image(self) -> str:
        return os.environ.get("IMAGE") or "baton:cpu"

    def _scale(self, **counts: int) -> None:
        for role, count in counts.items():
            self._project.compose(
                *("up", "-d", "--no-build", "--no-deps", "--no-recreate"),
                *("--scale", f"{role}={count}", role),
            )
        self._project.wait_healthy(START_LIMIT_S, **counts)

    def _restart(self, service: str) -> None:
        self._project.compose("restart", service)

    def _server_info_workers(self) -> list[WorkerStatus]:
        with self._client() as client:
            return list(client.server_info().workers)

    def _incarnation(self, worker_id: str) -> str:
        found = [w.worker for w in self._server_info_workers() if w.worker.worker_id == worker_id]
        return found[0].incarnation if found else ""

    def _wait_registered(self, count: int) -> None:
        def is_reached() -> bool:
            return [worker.healthy for worker in self._server_info_workers()] == [True] * count

        wait_until(is_reached, START_LIMIT_S, f"{count} workers registered")


def check(is_met: bool, expectation: str) -> None:
    if not is_met:
        raise Failed(expectation)


def timed(name: str, step: Callable[[], str]) -> None:
    say(f"         {name} ...")
    began_s = time.monotonic()
    seen = step()
    say(f"{time.monotonic() - began_s:6.1f} s {name}: {seen}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    # An interrupted test cleans up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        # Ports that are free, and the demo model.
        project = Project(f"baton-test-{os.getpid()}", {"PORT": "0", "HTTP_PORT": "0", "MODEL": ""})
    except EngineMissing as error:
        sys.stderr.write(f"compose-test: {error}\n")
        return 2
    with tempfile.TemporaryDirectory(prefix="baton-compose-") as directory:
        # The roles are somebody else.
        os.chmod(directory, 0o755)
        other_model = Path(directory) / OTHER_MODEL
        shutil.copytree(ROOT / "models" / "demo", other_model)
        try:
            Steps(project, other_model).run()
        except Exception as error:
            say(f"FAILED   {type(error).__name__}: {error}")
            say(project.compose("logs", "--no-color", "--tail", "40"))
            return 1
        finally:
            timed("tear down", lambda: tear_down(project))
    say("PASSED")
    return 0


def tear_down(project: Project) -> str:
    project.compose("down", "--volumes", "--remove-orphans", "--timeout", "10")
    check(not project.leftovers(), f"nothing is left: {project.leftovers()}")
    return "no container, network or volume is left"


if __name__ == "__main__":
    sys.exit(main())
