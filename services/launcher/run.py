"""`make run`: the stack with a model, one answer through it, then serving until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import deque
from pathlib import Path

import grpc

from baton.services.launcher.generate import Answer, stream_answer
from baton.services.launcher.roles import DEFAULT_HTTP_PORT, RoleCounts, StackConfig
from baton.services.launcher.stack import Stack
from baton.services.launcher.target import connect, report
from baton.services.launcher.up import notice_to_stderr, run_stack, to_stderr
from baton.shared.interrupt import exit_code
from baton.shared.model_files.named import model_dir
from baton.shared.rpc.flags import add_flag, length_or_auto, optional_port
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc as pb_grpc
from baton.v1 import types_pb2

_DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
_PROMPT = "In the beginning"
_QUESTION = "Why is the sky blue?"
_NUM_TOKENS = 96
_NUM_ANSWER_TOKENS = 64
_PROGRESS_EVERY_S = 2.0
_START_LIMIT_S = 300.0
_ANSWER_LIMIT_S = 120.0
_NUM_KEPT_LINES = 200


class _RoleLines:
    """The roles' logs: kept until the first answer, and shown if there is none; then shown as they
    come."""

    def __init__(self) -> None:
        self._kept: deque[str] | None = deque(maxlen=_NUM_KEPT_LINES)

    def write(self, line: str) -> None:
        if self._kept is None:
            to_stderr(line)
        else:
            self._kept.append(line)

    def forget(self) -> None:
        self._kept = None

    def show(self) -> None:
        kept, self._kept = self._kept or (), None
        for line in kept:
            to_stderr(line)


def main() -> int:
    args = _parse()
    config = StackConfig(
        model_dir=args.model,
        counts=RoleCounts(prefill=1, decode=1, both=0),
        # Nobody else has to know the port when there is but one answer.
        port=0 if args.once else args.port,
        http_port=None if args.once else args.http_port,
        # Whatever fits: who tries a model wants an answer of it first.
        max_model_len=args.max_model_len,
    )
    lines, is_demo = _RoleLines(), args.model.resolve() == _DEMO

    async def serve(stack: Stack) -> int:
        address = await _start(stack, args.model)
        code = await _answer_once(address, is_demo=is_demo)
        if args.once or code:
            return code
        lines.forget()
        _print_addresses(address, stack.http_address, is_demo=is_demo)
        await stack.watch()
        return 0

    code = run_stack(config, serve, emit=lines.write, notice=notice_to_stderr)
    if code:
        lines.show()
    return code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make run", description=__doc__)
    add_flag(
        parser,
        "--model",
        type=model_dir,
        default=_DEMO,
        help="model directory, or the name of a model that was fetched",
    )
    add_flag(parser, "--port", type=int, default=50051, help="port to listen on")
    add_flag(
        parser,
        "--http-port",
        type=optional_port,
        default=DEFAULT_HTTP_PORT,
        help="port of the OpenAI endpoint; none is without",
    )
    add_flag(
        parser,
        "--max-model-len",
        type=length_or_auto,
        default="auto",
        metavar="N|auto",
        help="tokens of prompt and answer; auto: the most for which each worker's pool has room",
    )
    parser.add_argument("--once", action="store_true", help="stop after one answer")
    return parser.parse_args()


async def _start(stack: Stack, model_dir: Path) -> str:
    """The address. Raises TimeoutError."""
    notice_to_stderr(
        f"starting Valkey, a prefill worker, a decode worker, the gateway: {model_dir}"
    )
    started = time.monotonic()
    start = asyncio.ensure_future(stack.start())
    try:
        async with asyncio.timeout(_START_LIMIT_S):
            while not (await asyncio.wait([start], timeout=_PROGRESS_EVERY_S))[0]:
                notice_to_stderr(f"still starting ({time.monotonic() - started:.0f} s)")
    finally:
        start.cancel()
    address = start.result()
    notice_to_stderr(f"ready after {time.monotonic() - started:.1f} s")
    return address


async def _answer_once(address: str, *, is_demo: bool) -> int:
    try:
        async with connect(address) as channel:
            info = await pb_grpc.InferenceServiceStub(channel).GetModelInfo(
                pb.GetModelInfoRequest()
            )
            answer = await stream_answer(
                channel, first_request(info, is_demo=is_demo), _show, timeout_s=_ANSWER_LIMIT_S
            )
    except grpc.aio.AioRpcError as error:
        return report(error, address)
    print(f"\n\n{_summary(answer)}")
    print(f"prompt and answer together may have {info.max_model_len} tokens", flush=True)
    return 0


def first_request(info: pb.GetModelInfoResponse, *, is_demo: bool) -> pb.GenerateRequest:
    """A question to a model that can answer, the beginning of a text to others; it is shown."""
    # The demo model has a chat template, and knows no answers.
    if info.HasField("chat_template") and not is_demo:
        _show(f"{_QUESTION}\n\n")
        question = pb.Message(role="user", content=_QUESTION)
        return pb.GenerateRequest(
            messages=pb.Messages(messages=[question]),
            sampling=types_pb2.SamplingParams(temperature=0.0, max_tokens=_NUM_ANSWER_TOKENS),
            clamp_max_tokens=True,
        )
    sampling = types_pb2.SamplingParams(
        temperature=0.7, top_p=0.95, seed=1, max_tokens=_NUM_TOKENS, ignore_eos=True
    )
    if info.has_tokenizer:
        _show(_PROMPT)
        return pb.GenerateRequest(text=_PROMPT, sampling=sampling)
    # To see that it works, any tokens will do.
    ids = pb.TokenIds(token_ids=range(1, min(9, info.vocab_size)))
    return pb.GenerateRequest(token_ids=ids, sampling=sampling)


def _summary(answer: Answer) -> str:
    timing = answer.finished.timing
    ttft_s = timing.ttft_time.ToTimedelta().total_seconds()
    decode_s = timing.e2e_time.ToTimedelta().total_seconds() - ttft_s
    num_tokens = len(answer.token_ids)
    rate = f"{(num_tokens - 1) / decode_s:.0f} tokens/s" if decode_s > 0 else "one token"
    workers = answer.finished.prefill_worker_id, answer.finished.decode_worker_id
    path = " -> ".join(worker for worker in workers if worker)
    return f"TTFT {ttft_s * 1e3:.0f} ms, then {rate} ({num_tokens} tokens, gateway -> {path})"


def _print_addresses(address: str, http_address: str | None, *, is_demo: bool) -> None:
    print(f"\ngRPC      {address}  (baton.v1.InferenceService)")
    if http_address is not None:
        print(f"OpenAI    http://{http_address}/v1")
    if is_demo:
        print(f"ask it    .venv/bin/baton generate --target {address} --prompt '{_PROMPT}'")
    else:
        print(f"talk      .venv/bin/baton chat --target {address}")
    print(f"look      .venv/bin/baton status --target {address}")
    print("stop      Ctrl-C", flush=True)


def _show(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
