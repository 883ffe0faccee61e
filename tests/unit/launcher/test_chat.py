"""`baton chat` from a pipe, and on a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import grpc
import pytest

from baton.services.launcher.__main__ import main
from baton.shared.rpc.errors import InvalidField, trailers
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from tests.unit.launcher.played_gateway import Gateway, Responses, chunk, started

ROOT = Path(__file__).parents[3]
LENGTH = types_pb2.FINISH_REASON_LENGTH

Told = tuple[int, str, str]
Talk = Callable[..., Told]


def finished(text: str = "", **fields: object) -> pb.GenerateResponse:
    return pb.GenerateResponse(finished=pb.GenerateFinished(text=text, **fields))  # type: ignore[arg-type]


def echo(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
    """Says how many messages there were, and the last one's content."""
    messages = request.messages.messages
    yield started()
    yield chunk(0, [1], f"{len(messages)} ")
    yield finished(messages[-1].content.upper())


def said(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    return [(each.role, each.content) for each in request.messages.messages]


@pytest.fixture
def asked(gateway: Gateway) -> list[pb.GenerateRequest]:
    """Requests that came; each is echoed."""
    gateway.model = pb.GetModelInfoResponse(
        model_name="toy", max_model_len=64, has_tokenizer=True, chat_template="{{ x }}"
    )
    return answered_by(gateway, echo)


def answered_by(
    gateway: Gateway, behaviour: Callable[[pb.GenerateRequest, grpc.ServicerContext], Responses]
) -> list[pb.GenerateRequest]:
    requests: list[pb.GenerateRequest] = []

    def note(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
        requests.append(request)
        return behaviour(request, context)

    gateway.behaviour = note
    return requests


@pytest.fixture
def talk(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Talk:
    """Lines of a pipe and flags → exit code, standard output, standard error."""

    def talk(lines: str | bytes, *flags: str) -> Told:
        raw = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        code = main(["chat", "--target", gateway.target, *flags])
        return (code, *capsys.readouterr())

    return talk


def test_what_was_said_goes_along(asked: list[pb.GenerateRequest], talk: Talk) -> None:
    flags = ["--system", "be kind", "--temperature", "0.5", "--seed", "7"]
    assert talk("one\n\n  \ntwo", *flags) == (0, "2 ONE\n4 TWO\n", "")
    first, second = asked
    assert said(first) == [("system", "be kind"), ("user", "one")]
    answered = [("assistant", "2 ONE"), ("user", "two")]
    assert said(second) == [*said(first), *answered]
    assert (second.sampling.temperature, second.sampling.seed) == (0.5, 7)
    # As much as fits.
    assert second.sampling.max_tokens == 64 and second.clamp_max_tokens


def test_commands(asked: list[pb.GenerateRequest], talk: Talk) -> None:
    lines = "one\n/clear\ntwo\n/nonsense\n/help\n/etc/passwd?\n /exit \nthree\n"
    code, out, err = talk(lines)
    assert (code, out) == (0, "1 ONE\n1 TWO\n3 /ETC/PASSWD?\n")
    assert [len(said(each)) for each in asked] == [1, 1, 3]
    assert "there is no command /nonsense; /help lists them" in err
    assert "a new conversation" in err and "Ctrl-C" in err


def test_bytes_that_are_no_text_do_no_harm(asked: list[pb.GenerateRequest], talk: Talk) -> None:
    code, out, _ = talk(b"caf\xe9\nna\xc3\xafve\n")
    assert (code, out) == (0, "1 CAF\ufffd\n3 NA\u00cfVE\n")


def test_an_answer_that_is_cut_off_is_said_to_be(
    gateway: Gateway, asked: object, talk: Talk
) -> None:
    def cut(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
        num_tokens = min(request.sampling.max_tokens, 40)
        usage = pb.Usage(num_prompt_tokens=24, num_completion_tokens=num_tokens)
        yield chunk(0, [1], "so far")
        yield finished(finish_reason=LENGTH, usage=usage)

    answered_by(gateway, cut)
    assert talk("x", "--max-tokens", "5") == (
        0,
        "so far\n",
        "cut off after 5 tokens, as --max-tokens says\n",
    )
    full = (
        "cut off: the conversation has 64 tokens, and no more fit; /clear begins a new conversation"
    )
    assert talk("x") == (0, "so far\n", f"{full}\n")
    # The room was less than what was asked for.
    assert talk("x", "--max-tokens", "50") == (0, "so far\n", f"{full}\n")


def test_a_conversation_that_is_full_says_how_to_go_on(
    gateway: Gateway, asked: object, talk: Talk
) -> None:
    problem = InvalidField("messages", "has 70 tokens", limit="64")

    def refuse(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
        if len(request.messages.messages) > 1:
            for key, value in trailers(problem):
                context.set_trailing_metadata(((key, value),))
            context.abort(problem.code, problem.message)
        return echo(request, context)

    requests = answered_by(gateway, refuse)
    # From a pipe nobody could say /clear.
    assert talk("one\ntwo\nthree\n") == (
        1,
        "1 ONE\n",
        "INVALID_ARGUMENT: messages has 70 tokens; limit: 64\n/clear begins a new conversation\n",
    )
    assert len(requests) == 2


def test_an_answer_that_breaks_is_one_line(gateway: Gateway, asked: object, talk: Talk) -> None:
    def break_off(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
        yield chunk(0, [1], "so far")
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone\nfor good")

    answered_by(gateway, break_off)
    assert talk("x\ny\n") == (1, "so far\n", "UNAVAILABLE: gone for good\n")


def test_an_answer_without_text_is_not_remembered(
    gateway: Gateway, asked: object, talk: Talk
) -> None:
    def nothing_first(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
        yield finished("" if request.messages.messages[-1].content == "one" else "yes")

    requests = answered_by(gateway, nothing_first)
    assert talk("one\ntwo\n") == (0, "\nyes\n", "")
    assert said(requests[1]) == [("user", "two")]


def test_without_a_template_nothing_is_asked(
    gateway: Gateway, asked: list[pb.GenerateRequest], talk: Talk
) -> None:
    gateway.model.ClearField("chat_template")
    code, out, err = talk("one\n")
    assert (code, out, asked) == (1, "", [])
    assert err == "toy has no chat template: baton generate continues text\n"


# Makes the terminal the controlling one, so that Ctrl-C becomes a signal, and becomes the command.
# Not `preexec_fn`: this process has threads of gRPC, whose handlers of a fork can end the child.
_OF_THE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """The command with a terminal of its own."""

    def __init__(self, *argv: str) -> None:
        ours, theirs = pty.openpty()
        self._fd = ours
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OF_THE_TERMINAL, "-m", "baton.services.launcher", *argv],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def types(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def sees(self, text: str, limit_s: float = 60.0) -> str:
        """Waits until `text` has come; returns what came up to there since the last call."""
        deadline = time.monotonic() + limit_s
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._fd, 4096).decode(errors="replace")
                except OSError:  # it has ended
                    assert text in self.seen, self.seen
        before, _, self.seen = self.seen.partition(text)
        return before

    def interrupts(self, text: str) -> None:
        """Presses Ctrl-C until `text` has come: at a prompt one that arrives between Python's look
        at its signals and its wait for a key is heeded with the next."""
        for limit_s in (10.0, 60.0):
            self.types("\x03")
            try:
                self.sees(text, limit_s)
            except AssertionError:
                continue
            return
        raise AssertionError(self.seen)

    def close(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._fd)


def test_ctrl_c_stops_an_answer_and_not_the_conversation(gateway: Gateway, asked: object) -> None:
    cancelled = Event()

    def dawdle(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
        if len(request.messages.messages) > 1:
            yield from echo(request, context)
            return
        context.add_callback(cancelled.set)
        yield chunk(0, [1], "Once upon")
        cancelled.wait()

    requests = answered_by(gateway, dawdle)
    terminal = Terminal("chat", "--target", gateway.target)
    try:
        assert "toy at" in terminal.sees("> ")
        terminal.types("tell\n")
        terminal.sees("Once upon")
        terminal.types("\x03")
        terminal.sees("stopped")
        assert cancelled.wait(10)
        # At the prompt it leaves the line, no more.
        terminal.sees("> ")
        # Not in one breath with Ctrl-C, which discards what nobody has read yet: readline, told
        # that there is a key and finding none, would wait for one and heed no signal.
        terminal.types("half a line")
        terminal.sees("half a line")
        terminal.interrupts("/exit or Ctrl-D ends the conversation")
        terminal.sees("> ")
        terminal.types("go on\n")
        terminal.sees("3 GO ON")
        terminal.sees("> ")
        terminal.types("\x04")
    finally:
        code = terminal.close()
    assert code == 0
    assert said(requests[1]) == [("user", "tell"), ("assistant", "Once upon"), ("user", "go on")]
