"""A client in a process of its own, to be killed: `python -m tests.faults.client TARGET`.

Reads one request, serialised, in hexadecimal, from standard input; writes the request id, then a
line for every token.
"""

from __future__ import annotations

import sys

import grpc

from baton.v1 import inference_service_pb2, inference_service_pb2_grpc


def main() -> None:
    with grpc.insecure_channel(sys.argv[1]) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        request = bytes.fromhex(sys.stdin.readline())
        for response in stub.Generate(inference_service_pb2.GenerateRequest.FromString(request)):
            lines = [str(token_id) for token_id in response.chunk.token_ids]
            if response.HasField("started"):
                lines = [response.started.request_id]
            sys.stdout.writelines(f"{line}\n" for line in lines)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
