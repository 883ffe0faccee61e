"""Asks a stack in containers over both of its ports, the way an outsider would."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import grpc

from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc, types_pb2
from tests.e2e.harness import Result, collect

_LIMIT_S = 120.0


class Client:
    """`grpc_address`, `http_address`: HOST:PORT. Close it, or use it in a `with`."""

    def __init__(self, grpc_address: str, http_address: str) -> None:
        self._http = f"http://{http_address}"
        # Whatever proxy the environment names, it is none for this.
        self._channel = grpc.insecure_channel(grpc_address, [("grpc.enable_http_proxy", 0)])
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._stub = inference_service_pb2_grpc.InferenceServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self._channel.close()

    def generate(
        self, prompt: str, max_tokens: int, watch: Callable[[int], None] = lambda _: None
    ) -> Result:
        """Greedy; `watch` is told the number of tokens so far, in each pause between messages."""
        sampling = types_pb2.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = pb.GenerateRequest(text=prompt, sampling=sampling)

        def watched() -> Iterator[pb.GenerateResponse]:
            num_tokens = 0
            for response in self._stub.Generate(request, timeout=_LIMIT_S):
                yield response
                num_tokens += len(response.chunk.token_ids)
                watch(num_tokens)

        return collect(watched())

    def generate_at_once(
        self, prompts: Sequence[str], max_tokens: int, meanwhile: Callable[[], object]
    ) -> list[Result]:
        """All together; `meanwhile` happens when each has some tokens and none is through."""
        midway = Barrier(len(prompts) + 1)

        def ask(prompt: str) -> Result:
            has_met = False

            def watch(num_tokens: int) -> None:
                nonlocal has_met
                if num_tokens and not has_met:
                    has_met = True
                    midway.wait(_LIMIT_S)

            try:
                return self.generate(prompt, max_tokens, watch)
            except BaseException:
                midway.abort()
                raise

        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = [pool.submit(ask, prompt) for prompt in prompts]
            midway.wait(_LIMIT_S)
            meanwhile()
            return [answer.result() for answer in answers]

    def server_info(self) -> pb.GetServerInfoResponse:
        return self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)

    def model_name(self) -> str:
        return self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10).model_name

    def complete(self, prompt: str, max_tokens: int, *, stream: bool) -> str:
        """The same question to the OpenAI endpoint."""
        body = {"model": self.model_name(), "prompt": prompt, "max_tokens": max_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "stream": stream}
        request = urllib.request.Request(
            f"{self._http}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with self._opener.open(request, timeout=_LIMIT_S) as response:
            if not stream:
                return _text(json.load(response))
            lines = [line.decode().strip() for line in response]
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        if events[-1] != "[DONE]":
            raise AssertionError(f"the stream ends with {events[-1]!r}")
        return "".join(_text(json.loads(event)) for event in events[:-1])

    def get(self, path: str) -> str:
        """The body of a page; raises unless its status is 200."""
        with self._opener.open(f"{self._http}{path}", timeout=10) as response:
            body: bytes = response.read()
            return body.decode()


def _text(answer: Any) -> str:
    return "".join(str(choice["text"]) for choice in answer["choices"])
