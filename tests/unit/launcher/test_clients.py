"""`baton generate` and `baton status` against a gateway that says what the test wants."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from baton.services.launcher.__main__ import main
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import types_pb2
from tests.unit.launcher.played_gateway import Gateway, Responses, chunk, started

_ROOT = Path(__file__).parents[3]


def answer_with_text(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
    yield started()
    yield chunk(0, [11], "Hé")
    yield chunk(1, [12, 13], "llo")
    yield pb.GenerateResponse(
        finished=pb.GenerateFinished(
            finish_reason=types_pb2.FINISH_REASON_STOP,
            text=" you",
            usage=pb.Usage(num_prompt_tokens=4, num_completion_tokens=3, num_cached_tokens=2),
            timing=pb.GenerateTiming(
                ttft_time=Duration(nanos=250_000_000),
                tpot_time=Duration(nanos=500_000),
                e2e_time=Duration(seconds=1, nanos=500_000_000),
                transfer_time=Duration(nanos=1_000_000),
            ),
            prefill_worker_id="prefill-0",
            decode_worker_id="decode-0",
            num_attempts=2,
        )
    )


def answer_without_text(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
    yield started()
    yield chunk(0, [request.token_ids.token_ids[0] + 1], None)
    yield pb.GenerateResponse(
        finished=pb.GenerateFinished(
            finish_reason=types_pb2.FINISH_REASON_LENGTH,
            usage=pb.Usage(num_prompt_tokens=1, num_completion_tokens=1),
            timing=pb.GenerateTiming(ttft_time=Duration(seconds=1), e2e_time=Duration(seconds=1)),
            decode_worker_id="both-0",
            num_attempts=1,
        )
    )


def test_text_is_streamed(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.behaviour = answer_with_text
    assert main(["generate", "--target", gateway.target, "--prompt", "x"]) == 0
    assert capsys.readouterr().out == "Héllo you\n"


def test_ids_are_streamed_without_tokenizer(
    gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    def count_up(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
        yield from (chunk(0, [1, 2], None), chunk(2, [3], None))
        yield pb.GenerateResponse(finished=pb.GenerateFinished())

    gateway.behaviour = count_up
    assert main(["generate", "--target", gateway.target, "--token-ids", "9"]) == 0
    assert capsys.readouterr().out == "1 2 3\n"


def test_json_is_one_object_on_one_line(
    gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.behaviour = answer_with_text
    assert main(["generate", "--target", gateway.target, "--prompt", "x", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "text": "Héllo you",
        "token_ids": [11, 12, 13],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 4, "completion_tokens": 3, "cached_tokens": 2},
        "timing": {"ttft_s": 0.25, "tpot_s": 0.0005, "e2e_s": 1.5, "transfer_s": 0.001},
        "workers": {"prefill": "prefill-0", "decode": "decode-0"},
        "attempts": 2,
    }


def test_json_has_null_for_what_there_is_not(
    gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.behaviour = answer_without_text
    assert main(["generate", "--target", gateway.target, "--token-ids", "9", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["token_ids"]) == (None, [10])
    assert answer["timing"] == {"ttft_s": 1.0, "tpot_s": None, "e2e_s": 1.0, "transfer_s": None}
    assert answer["workers"] == {"prefill": None, "decode": "both-0"}


def three_samples(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
    """The second ends first, then the first, the third without text."""
    assert request.n == 3
    yield started()
    for sample, index, text in ((0, 0, "a"), (1, 0, "x"), (0, 1, "b"), (2, 0, ""), (1, 1, "y")):
        piece = pb.GenerateChunk(sample=sample, first_index=index, token_ids=[5], text=text)
        yield pb.GenerateResponse(chunk=piece)
    for sample, text in ((1, "z"), (0, "c"), (2, "")):
        usage = pb.Usage(num_prompt_tokens=4, num_completion_tokens=sample + 1)
        finished = pb.GenerateFinished(sample=sample, text=text, usage=usage)
        yield pb.GenerateResponse(finished=finished)


def test_samples_are_shown_one_after_another(
    gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.behaviour = three_samples
    arguments = ["generate", "--target", gateway.target, "--prompt", "x", "--n", "3"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "abc\nxyz\n\n"
    assert main([*arguments, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shown = [(answer["sample"], answer["text"]) for answer in answers]
    assert shown == [(0, "abc"), (1, "xyz"), (2, "")]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [1, 2, 3]


def test_an_rpc_error_is_one_line_with_its_code(
    gateway: Gateway, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
        yield started()
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "token_ids: empty; limit: at least 1")

    gateway.behaviour = refuse
    assert main(["generate", "--target", gateway.target, "--prompt", "x", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "INVALID_ARGUMENT: token_ids: empty; limit: at least 1\n"
    assert captured.out == ""


def test_a_gateway_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate", "--prompt", "x"], ["chat"], ["status"]):
        assert main([*command, "--target", "127.0.0.1:1"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("UNAVAILABLE: ") and err.count("\n") == 1


def test_the_deadline_is_sent(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    cancelled = Event()

    def dawdle(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
        context.add_callback(cancelled.set)
        yield started()
        cancelled.wait()

    gateway.behaviour = dawdle
    argv = ["generate", "--target", gateway.target, "--prompt", "x", "--timeout", "0.2"]
    assert main(argv) == 1
    assert capsys.readouterr().err.startswith("DEADLINE_EXCEEDED: ")


def test_ctrl_c_cancels(gateway: Gateway) -> None:
    cancelled = Event()

    def begin(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Responses:
        context.add_callback(cancelled.set)
        yield chunk(0, [1], "begun")
        cancelled.wait()

    gateway.behaviour = begin
    argv = ["generate", "--target", gateway.target, "--prompt", "x"]
    client = subprocess.Popen(
        [sys.executable, "-m", "baton.services.launcher", *argv],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with client:
        assert client.stdout is not None
        assert client.stdout.read(5) == b"begun"
        client.send_signal(signal.SIGINT)
        _, stderr = client.communicate(timeout=60)
    assert client.returncode == 130
    assert stderr == b""
    assert cancelled.wait(60)


@pytest.fixture
def server_info() -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(
        version="0.1.0",
        gateway_incarnation="g1",
        directory_reachable=True,
        workers=[
            pb.WorkerStatus(
                worker=types_pb2.WorkerAddress(
                    worker_id="decode-0", incarnation="d1", address="127.0.0.1:4"
                ),
                role=types_pb2.WORKER_ROLE_DECODE,
                healthy=False,
                num_waiting=1,
                num_running=2,
                num_free_blocks=30,
                num_blocks=40,
                capability_hash="c",
                determinism="exact (torch, keys and values in fp8)",
                max_model_len=640,
                model_impl="other 1.0",
                num_checkpoints=7,
                drafter="ngram:7",
            )
        ],
        ledger=[pb.LedgerStageCount(stage="DECODING", num_entries=2)],
        num_prefix_entries=5,
        counters=pb.ServerCounters(num_digest_mismatches=3),
        default_sampling=types_pb2.SamplingParams(temperature=0.6, top_k=20),
    )


def test_status_as_json(
    gateway: Gateway, server_info: pb.GetServerInfoResponse, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.info = server_info
    assert main(["status", "--target", gateway.target, "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert state["workers"] == [
        {
            "id": "decode-0",
            "role": "decode",
            "incarnation": "d1",
            "address": "127.0.0.1:4",
            "healthy": False,
            "num_waiting": 1,
            "num_running": 2,
            "num_free_blocks": 30,
            "num_blocks": 40,
            "capability_hash": "c",
            "determinism": "exact (torch, keys and values in fp8)",
            "max_model_len": 640,
            "model_impl": "other 1.0",
            "num_checkpoints": 7,
            "drafter": "ngram:7",
        }
    ]
    assert state["ledger"] == {"DECODING": 2}
    assert state["num_prefix_entries"] == 5
    assert state["counters"]["num_digest_mismatches"] == 3
    assert state["counters"]["num_preemptions"] == 0
    assert state["default_sampling"] == {"temperature": 0.6, "top_k": 20}


def test_status_as_table(
    gateway: Gateway, server_info: pb.GetServerInfoResponse, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.info = server_info
    assert main(["status", "--target", gateway.target]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["decode-0", "decode", "d1", "NO", "1", "2", "30/40", "640"] in lines
    said = "decode-0 runs the model through other 1.0: slower than Baton's own"
    assert said.split() in lines
    assert "answers are exact (torch, keys and values in fp8)".split() in lines
    assert "decode-0 keeps 7 states for later prompts".split() in lines
    assert ["digest", "mismatches", "3"] in lines
    assert "ledger: DECODING 2".split() in lines
    assert "sampling defaults of the model: temperature 0.6, top_k 20".split() in lines


def test_status_tells_the_model_and_what_the_directory_refuses(
    gateway: Gateway, server_info: pb.GetServerInfoResponse, capsys: pytest.CaptureFixture[str]
) -> None:
    def first_lines() -> list[str]:
        gateway.info = server_info
        assert main(["status", "--target", gateway.target]) == 0
        return capsys.readouterr().out.splitlines()[:2]

    answering, model = first_lines()
    assert answering.endswith("; directory answers") and model == "model not known yet"
    server_info.model_digest = 64 * "d"
    server_info.directory_reachable = False
    server_info.directory_problem = "directory refused: MISCONF"
    refusing, model = first_lines()
    assert refusing.endswith("; directory refused: MISCONF") and "answers" not in refusing
    assert model == f"model {64 * 'd'}"
