"""A role without a model: `fake_role.py KIND NAME JOURNAL [PORT]`.

Says READY, writes what happens to it into the journal, and ends at SIGTERM. NAME's entry in
FAKE_ROLE_EXITS (JSON: name → code) makes it write two lines and exit with that code instead.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc


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
        server, port = _serve(int(sys.argv[4]))
        address = f"127.0.0.1:{port}"
    _note(journal, f"{name} started {os.getpid()} {address}")
    sys.stdout.write(f"chatter of {name}\nREADY grpc={address}\n")
    sys.stdout.flush()
    signal.sigwait({signal.SIGTERM})
    _note(journal, f"{name} told to stop")


class _Gateway(inference_service_pb2_grpc.InferenceServiceServicer):
    """As much as the launcher asks before it says READY."""

    def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(model_name="fake", vocab_size=8, max_model_len=8)

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(finished=pb.GenerateFinished())

    def Tokenize(self, request: Any, context: Any) -> pb.TokenizeResponse:
        raise NotImplementedError

    def Detokenize(self, request: Any, context: Any) -> pb.DetokenizeResponse:
        raise NotImplementedError

    def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:
        raise NotImplementedError


def _serve(port: int) -> tuple[grpc.Server, int]:
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    servicer.set("baton.v1.InferenceService", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(_Gateway(), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, bound


def _note(journal: Path, line: str) -> None:
    with journal.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
