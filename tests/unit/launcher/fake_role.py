"""A role without a model: `fake_role.py KIND NAME JOURNAL [PORT]`.

Says READY, writes what happens to it into the journal, and ends at SIGTERM. NAME's entry in
FAKE_ROLE_EXITS (JSON: name → code) makes it write two lines and exit with that code instead.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


def main() -> None:
    kind, name, journal = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    code = json.loads(os.environ.get("FAKE_ROLE_EXITS", "{}")).get(name)
    if code is not None:
        sys.stderr.write(f"looking at the model\nbroken.safetensors: truncated (said {name})\n")
        sys.exit(code)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    address = "nowhere:1"
    if kind == "gateway":
        # It serves for as long as somebody holds it.
        server, port = _serve_health(int(sys.argv[4]))
        address = f"127.0.0.1:{port}"
    _note(journal, f"{name} started {os.getpid()} {address}")
    sys.stdout.write(f"chatter of {name}\nREADY grpc={address}\n")
    sys.stdout.flush()
    signal.sigwait({signal.SIGTERM})
    _note(journal, f"{name} told to stop")


def _serve_health(port: int) -> tuple[grpc.Server, int]:
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    servicer.set("baton.v1.InferenceService", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, bound


def _note(journal: Path, line: str) -> None:
    with journal.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
