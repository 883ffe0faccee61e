"""`baton chat`: a conversation in the terminal, or with what a pipe says line by line.

Standard output gets the answers and nothing else; what there is to say about them goes to standard
error.
"""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from baton.services.launcher.generate import Answer, stream_answer
from baton.services.launcher.output import reader_may_leave
from baton.services.launcher.target import connect, report
from baton.shared.interrupt import EXIT_INTERRUPTED
from baton.shared.rpc.errors import failure_of
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc as pb_grpc
from baton.v1 import types_pb2

_INFO_LIMIT_S = 10.0
_COMMANDS = """\
/exit    end the conversation, as Ctrl-D does
/clear   begin a new one
/help    this list
Ctrl-C   stop the running answer"""
_CLEAR = "/clear begins a new conversation"


@dataclass
class Conversation:
    """What was said so far."""

    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    """Questions with their answers, also those that were stopped."""

    def messages(self, question: str) -> pb.Messages:
        said = [] if self.system is None else [pb.Message(role="system", content=self.system)]
        for asked, answer in self.turns:
            said.append(pb.Message(role="user", content=asked))
            said.append(pb.Message(role="assistant", content=answer))
        return pb.Messages(messages=[*said, pb.Message(role="user", content=question)])


def run_chat(
    target: str,
    *,
    system: str | None,
    sampling: types_pb2.SamplingParams,
    timeout_s: float | None,
) -> int:
    """Talks until the input ends; returns the exit code."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    read = _read_terminal if is_interactive else _read_pipe
    exit_code = 0
    try:
        with reader_may_leave(), asyncio.Runner() as runner:
            chat = _Chat(runner, target, Conversation(system), sampling, timeout_s, is_interactive)
            exit_code = chat.run(read)
    except grpc.aio.AioRpcError as error:
        return report(error, target)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return exit_code


class _Chat:
    def __init__(
        self,
        runner: asyncio.Runner,
        target: str,
        conversation: Conversation,
        sampling: types_pb2.SamplingParams,
        timeout_s: float | None,
        is_interactive: bool,
    ) -> None:
        self._runner = runner
        self._target = target
        self._conversation = conversation
        self._sampling = sampling
        self._timeout_s = timeout_s
        self._is_interactive = is_interactive
        self._channel: grpc.aio.Channel
        self._info = pb.GetModelInfoResponse()

    def run(self, read: Callable[[], str | None]) -> int:
        """Raises AioRpcError; KeyboardInterrupt where nobody sits at a terminal."""
        self._channel = self._runner.run(self._connect())
        try:
            self._info = self._runner.run(self._model_info())
            if not self._info.HasField("chat_template"):
                _note(
                    f"{self._info.model_name} has no chat template: baton generate continues text"
                )
                return 1
            if self._is_interactive:
                _note(f"{self._info.model_name} at {self._target}; /exit ends, /help says more")
            return self._converse(read)
        finally:
            self._runner.run(self._channel.close())

    def _converse(self, read: Callable[[], str | None]) -> int:
        while True:
            try:
                line = read()
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise
                _note("\n/exit or Ctrl-D ends the conversation")
                continue
            word = "" if line is None else line.strip()
            if line is None or word == "/exit":
                return 0
            if word == "/clear":
                self._conversation.turns.clear()
                _note("a new conversation")
            elif word == "/help":
                _note(_COMMANDS)
            elif word.startswith("/") and " " not in word and "/" not in word[1:]:
                _note(f"there is no command {word}; /help lists them")
            elif word and not self._answer(line) and not self._is_interactive:
                return 1

    def _answer(self, question: str) -> bool:
        """Asks, shows the answer, and remembers both; False when the request failed."""
        shown: list[str] = []

        def show(text: str) -> None:
            shown.append(text)
            sys.stdout.write(text)
            sys.stdout.flush()

        request = pb.GenerateRequest(
            messages=self._conversation.messages(question),
            sampling=self._sampling,
            clamp_max_tokens=True,
        )
        if not self._sampling.HasField("max_tokens"):
            request.sampling.max_tokens = self._info.max_model_len
        try:
            answer = self._runner.run(self._ask(request, show))
            show("\n")
            self._say_why_cut_off(answer)
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
            _note("\nstopped")
        except grpc.aio.AioRpcError as error:
            if shown:
                show("\n")
            report(error, self._target)
            failure = failure_of(error)
            if self._conversation.turns and failure is not None and failure.field == "messages":
                _note(_CLEAR)
            return False
        # An answer of which nothing came is not said: templates want both sides in turn.
        text = "".join(shown).removesuffix("\n")
        if text:
            self._conversation.turns.append((question, text))
        return True

    def _say_why_cut_off(self, answer: Answer) -> None:
        usage = answer.finished.usage
        if answer.finished.finish_reason != types_pb2.FINISH_REASON_LENGTH:
            return
        if usage.num_completion_tokens == self._sampling.max_tokens:
            _note(f"cut off after {usage.num_completion_tokens} tokens, as --max-tokens says")
            return
        num_tokens = usage.num_prompt_tokens + usage.num_completion_tokens
        _note(f"cut off: the conversation has {num_tokens} tokens, and no more fit; {_CLEAR}")

    async def _connect(self) -> grpc.aio.Channel:
        return connect(self._target)

    async def _model_info(self) -> pb.GetModelInfoResponse:
        stub = pb_grpc.InferenceServiceStub(self._channel)
        return await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=_INFO_LIMIT_S)

    async def _ask(self, request: pb.GenerateRequest, show: Callable[[str], None]) -> Answer:
        return await stream_answer(self._channel, request, show, timeout_s=self._timeout_s)


def _read_terminal() -> str | None:
    """A line that may be edited, and those before it brought back; None at the end."""
    try:
        import readline  # noqa: F401  (what it does, `input` does then)
    except ImportError:
        pass
    try:
        return input("> ")
    except EOFError:
        sys.stdout.write("\n")
        return None


def _read_pipe() -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
