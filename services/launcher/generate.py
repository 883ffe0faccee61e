"""`baton generate`: one prompt, its answer, or several of them, streamed to standard output."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from baton.services.launcher.output import reader_may_leave
from baton.services.launcher.target import connect, report
from baton.shared.interrupt import EXIT_INTERRUPTED
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc as pb_grpc
from baton.v1 import types_pb2

_FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass
class Answer:
    """What has arrived of a sample; `text` stays None without a tokenizer."""

    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list)
    finished: pb.GenerateFinished = field(default_factory=pb.GenerateFinished)

    def add_text(self, text: str) -> None:
        self.text = (self.text or "") + text


def run_generate(
    target: str, request: pb.GenerateRequest, *, as_json: bool, timeout_s: float | None
) -> int:
    """Prints the answer, or one object on one line, for each sample; returns the exit code."""
    in_turn = _InTurn(_ignore if as_json else _write)
    try:
        with reader_may_leave():
            answers = asyncio.run(_ask(target, request, in_turn, timeout_s=timeout_s))
            for sample, answer in answers.items():
                if as_json:
                    about = {"sample": sample} if request.n > 1 else {}
                    _write(json.dumps({**about, **to_json(answer)}) + "\n")
    except grpc.aio.AioRpcError as error:
        return report(error, target)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


class _InTurn:
    """Shows samples one after another, each from a line of its own on: the first as it comes, what
    has come of the next when the one before has ended."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._shown = 0
        """The sample that is shown."""
        self._held: dict[int, str] = {}
        """What has come of later ones."""
        self._ended: set[int] = set()

    def __call__(self, sample: int, piece: str | None) -> None:
        if piece is None:
            self._ended.add(sample)
        elif sample == self._shown:
            self._show(piece)
        else:
            self._held[sample] = self._held.get(sample, "") + piece
        while self._shown in self._ended:
            self._show("\n")
            self._shown += 1
            self._show(self._held.pop(self._shown, ""))


async def stream_answer(
    channel: grpc.aio.Channel,
    request: pb.GenerateRequest,
    on_piece: Callable[[str], None],
    *,
    timeout_s: float | None = None,
) -> Answer:
    """Sends `request`, which asks for one sample; `on_piece` gets text as it comes, or token ids
    where there is no text.

    Raises grpc.aio.AioRpcError.
    """
    answers = await _stream(
        channel, request, lambda _, piece: on_piece(piece or ""), timeout_s=timeout_s
    )
    return answers.get(0, Answer())


async def _stream(
    channel: grpc.aio.Channel,
    request: pb.GenerateRequest,
    on_piece: Callable[[int, str | None], None],
    *,
    timeout_s: float | None,
) -> dict[int, Answer]:
    """By sample, in order. `on_piece` gets the sample of each piece; None: that was all of it."""
    call = pb_grpc.InferenceServiceStub(channel).Generate(request, timeout=timeout_s)
    answers: dict[int, Answer] = {}
    try:
        async for message in call:
            if message.HasField("prompt_logprobs"):
                told = message.prompt_logprobs.tokens
                answers.setdefault(0, Answer()).prompt_logprobs += told
            elif message.HasField("chunk"):
                sample = message.chunk.sample
                answer = answers.setdefault(sample, Answer())
                on_piece(sample, _take_chunk(answer, message.chunk))
            elif message.HasField("finished"):
                sample = message.finished.sample
                answer = answers.setdefault(sample, Answer())
                answer.finished = message.finished
                if message.finished.HasField("text"):
                    answer.add_text(message.finished.text)
                    on_piece(sample, message.finished.text)
                on_piece(sample, None)
    finally:
        # Has no effect on a call that has ended.
        call.cancel()
    return dict(sorted(answers.items()))


def to_json(answer: Answer) -> dict[str, Any]:
    """Logprobs are there if they were asked for; a prompt's with the first sample's answer, from
    the prompt's second token on."""
    finished = answer.finished
    logprobs = {"prompt_logprobs": answer.prompt_logprobs, "logprobs": answer.logprobs}
    return {
        **{name: [_logprobs(each) for each in told] for name, told in logprobs.items() if told},
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": _FINISH_REASONS.get(finished.finish_reason),
        "usage": {
            "prompt_tokens": finished.usage.num_prompt_tokens,
            "completion_tokens": finished.usage.num_completion_tokens,
            "cached_tokens": finished.usage.num_cached_tokens,
        },
        "timing": {
            f"{name}_s": _seconds(finished.timing, f"{name}_time")
            for name in ("ttft", "tpot", "e2e", "transfer")
        },
        "workers": {
            "prefill": finished.prefill_worker_id or None,
            "decode": finished.decode_worker_id or None,
        },
        "attempts": finished.num_attempts,
    }


async def _ask(
    target: str,
    request: pb.GenerateRequest,
    on_piece: Callable[[int, str | None], None],
    *,
    timeout_s: float | None,
) -> dict[int, Answer]:
    async with connect(target) as channel:
        return await _stream(channel, request, on_piece, timeout_s=timeout_s)


def _take_chunk(answer: Answer, chunk: pb.GenerateChunk) -> str:
    """The part of a message that is shown."""
    separator = " " if answer.token_ids else ""
    answer.token_ids += chunk.token_ids
    answer.logprobs += chunk.logprobs
    if chunk.HasField("text"):
        answer.add_text(chunk.text)
        return chunk.text
    return separator + " ".join(str(token_id) for token_id in chunk.token_ids)


def _logprobs(told: types_pb2.TokenLogprobs) -> dict[str, Any]:
    top = dict(zip(told.top_token_ids, told.top_logprobs, strict=True))
    return {"logprob": told.logprob, "rank": told.rank, "top": top}


def _seconds(timing: pb.GenerateTiming, name: str) -> float | None:
    if not timing.HasField(name):
        return None
    duration: Duration = getattr(timing, name)
    return duration.seconds + duration.nanos / 1e9


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    """With --json nothing is shown before the end."""
