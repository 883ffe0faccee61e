"""`baton up` and the commands against it, as processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest

from baton.v1 import inference_service_pb2, inference_service_pb2_grpc, types_pb2
from tests.device import ROOT
from tests.e2e.launched import Launched, ask, only_line, wait_for
from tests.ipv6 import needs_ipv6

pytestmark = pytest.mark.e2e

UP = "baton.services.launcher"
Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launched: list[Launched] = []

    def start(module: str, *arguments: str) -> Launched:
        launched.append(Launched(tmp_path, module, *arguments))
        return launched[-1]

    yield start
    for each in launched:
        each.kill()


@pytest.fixture(scope="module")
def up(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """One prefill and one decode worker: what no role flag means."""
    tmp_path = tmp_path_factory.mktemp("up")
    launched = Launched(
        tmp_path, UP, "up", "--model", str(tiny_model), "--port", "0", "--num-blocks", "64"
    )
    try:
        launched.wait_ready()
        yield launched
    finally:
        launched.kill()


def test_generate_answers_in_one_json_object(up: Launched) -> None:
    answer = _generate(up, "--max-tokens", "8", "--temperature", "0", "--ignore-eos")

    assert set(answer) == {
        *("text", "token_ids", "finish_reason", "usage", "timing", "workers", "attempts")
    }
    assert answer["text"] is None
    assert len(answer["token_ids"]) == 8
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "cached_tokens": 0}
    assert set(answer["timing"]) == {"ttft_s", "tpot_s", "e2e_s", "transfer_s"}
    assert 0 < answer["timing"]["ttft_s"] < answer["timing"]["e2e_s"]
    assert answer["workers"] == {"prefill": "prefill-0", "decode": "decode-0"}
    assert answer["attempts"] == 1


def test_generate_says_code_and_message_of_an_error(up: Launched) -> None:
    run = ask(
        *(up.tmp_path, "generate", "--target", up.wait_ready(), "--token-ids", "1,512", "--json")
    )

    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("INVALID_ARGUMENT: token_ids[1] ")
    assert run.stderr.count("\n") == 1


def test_status_tells_workers_ledger_and_counters(up: Launched) -> None:
    def is_idle() -> bool:
        status.update(_status(up))
        all_free = all(worker["num_free_blocks"] == 64 for worker in status["workers"])
        is_done = all_free and not sum(status["ledger"].values())
        return is_done and bool(status["directory_reachable"])

    status: dict[str, Any] = {}
    # Load comes with the heartbeats: what was before this test may still be told. A directory
    # that is too busy to answer counts as away for a moment.
    wait_for(is_idle)

    workers = {worker["id"]: worker for worker in status["workers"]}
    assert set(workers) == {"prefill-0", "decode-0"}
    for name, worker in workers.items():
        assert name == f"{worker['role']}-0"
        assert worker["healthy"] is True
        assert worker["num_blocks"] == worker["num_free_blocks"] == 64
        assert worker["num_waiting"] == worker["num_running"] == 0
        assert len(worker["incarnation"]) == 32
    assert status["num_prefix_entries"] == 0
    assert {"num_digest_mismatches", "num_extra_attempts", "num_preemptions", "num_cancelled"} <= (
        set(status["counters"])
    )


@pytest.mark.parametrize("name", ["decode-0", "prefill-0", "gateway", "valkey"])
def test_a_role_that_is_killed_is_reported_and_started_again(up: Launched, name: str) -> None:
    address, before = up.wait_ready(), up.pids()
    answer = _generate(up, "--max-tokens", "8", "--temperature", "0")

    os.kill(before[name], signal.SIGKILL)
    wait_for(lambda: up.pids().get(name, before[name]) != before[name])

    report = f"{name} was killed by SIGKILL; starting it again"
    wait_for(lambda: (report if name != "valkey" else "valkey died") in up.stderr)
    # The gateway is away for a moment, the workers are waited for.
    wait_for(lambda: name != "gateway" or _answers(address))
    again = _generate(up, "--max-tokens", "8", "--temperature", "0")
    assert again["token_ids"] == answer["token_ids"]
    others = before.keys() - {name}
    # What is started or ends while /proc is read may hide another process.
    wait_for(lambda: others <= up.pids().keys())
    after = up.pids()
    assert {key: after.get(key) for key in others} == {key: before[key] for key in others}
    assert up.wait_ready() == address


def test_sigterm_drains_and_leaves_nothing(launch: Launch, tiny_model: Path) -> None:
    launched = launch(UP, "up", "--model", str(tiny_model), "--port", "0", "--both", "1")
    address = launched.wait_ready()
    pids = launched.pids()
    assert set(pids) == {"both-0", "gateway", "valkey"}
    assert _generate(launched, "--max-tokens", "4")["workers"] == {
        "prefill": None,
        "decode": "both-0",
    }

    with grpc.insecure_channel(address) as channel:
        answer = _begin_answer(channel, max_tokens=300)
        launched.process.send_signal(signal.SIGTERM)
        *_, last = answer

    assert last.finished.usage.num_completion_tokens == 300
    assert launched.wait_exit() == 0
    launched.assert_nothing_left()
    assert list(launched.tmp_path.glob("baton-*")) == []
    assert launched.stdout == f"READY grpc={address}\n"
    assert not _answers(address)


@needs_ipv6
def test_ipv6_and_a_name_for_the_model(launch: Launch, tiny_model: Path) -> None:
    flags = ["--port", "0", "--http-port", "0", "--both", "1", "--host", "::1"]
    name = "org/tale"
    launched = launch(UP, "up", "--model", str(tiny_model), *flags, "--model-name", name)
    wait_for(lambda: "\n" in launched.stdout or launched.process.poll() is not None)
    ready = re.fullmatch(r"READY grpc=(\[::1\]:\d+) http=(\[::1\]:\d+)\n", launched.stdout)
    assert ready is not None, launched.stderr

    answer = ask(launched.tmp_path, "generate", "--target", ready[1], "--token-ids", "5,6,7")
    assert answer.returncode == 0, answer.stderr
    with urlopen(f"http://{ready[2]}/v1/models", timeout=10) as response:
        assert json.load(response)["data"][0]["id"] == name
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_exit() == 0
    launched.assert_nothing_left()


def test_nothing_outlives_a_launcher_that_is_killed(launch: Launch, tiny_model: Path) -> None:
    launched = launch(UP, "up", "--model", str(tiny_model), "--port", "0")
    address = launched.wait_ready()
    pids = launched.pids()
    assert set(pids) == {"prefill-0", "decode-0", "gateway", "valkey"}

    with grpc.insecure_channel(address) as channel:
        answer = _begin_answer(channel, max_tokens=4000)
        launched.kill()
        with pytest.raises(grpc.RpcError):
            list(answer)

    launched.assert_nothing_left()
    assert not _answers(address)


def test_run_once_streams_one_answer_of_the_demo_model(launch: Launch) -> None:
    launched = launch("baton.services.launcher.run", "--model", str(ROOT / "models/demo"), "--once")

    assert launched.wait_exit() == 0, launched.stderr
    answer, summary = launched.stdout.split("\n\nTTFT ")
    assert answer.startswith("In the beginning") and len(answer) > len("In the beginning") + 20
    assert "96 tokens, gateway -> prefill-0 -> decode-0" in summary
    launched.assert_nothing_left()


def _missing_directory(model: Path) -> str:
    shutil.rmtree(model)
    return f"{model}: "


def _truncated_weights(model: Path) -> str:
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    return f"{model}/model.safetensors: truncated"


def _unsupported_model_type(model: Path) -> str:
    _change_config(model, model_type="mamba")
    return f"{model}/config.json: model_type: "


@pytest.mark.parametrize(
    "spoil",
    [
        _missing_directory,
        _unsupported_model_type,
        _truncated_weights,
    ],
)
def test_bad_model_is_one_line_and_nothing_listens(
    launch: Launch, tiny_model: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    names = spoil(model)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    port = address.rpartition(":")[2]

    launched = launch(UP, "up", "--model", str(model), "--port", port)
    listened = False
    while launched.process.poll() is None:
        launched.pids()
        listened |= _answers(address)
        time.sleep(0.02)

    assert launched.wait_exit() == 2
    assert re.match(f"baton( worker)?: {re.escape(names)}", launched.stderr)
    assert launched.stderr.count("\n") == 1
    assert launched.stdout == ""
    assert not listened
    launched.assert_nothing_left()


def _change_config(model: Path, **fields: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _generate(launched: Launched, *arguments: str) -> dict[str, Any]:
    run = ask(
        *(launched.tmp_path, "generate", "--target", launched.wait_ready()),
        *("--token-ids", "5,6,7", "--json", *arguments),
    )
    assert run.returncode == 0, run.stderr
    return only_line(run.stdout)


def _begin_answer(
    channel: grpc.Channel, *, max_tokens: int
) -> Iterator[inference_service_pb2.GenerateResponse]:
    """The rest of an answer whose first tokens have come."""
    request = inference_service_pb2.GenerateRequest(
        token_ids=inference_service_pb2.TokenIds(token_ids=[5, 6, 7]),
        sampling=types_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
    )
    answer = inference_service_pb2_grpc.InferenceServiceStub(channel).Generate(request)
    assert next(answer).HasField("started")
    assert next(answer).HasField("chunk")
    return answer


def _status(launched: Launched) -> dict[str, Any]:
    run = ask(launched.tmp_path, "status", "--target", launched.wait_ready(), "--json")
    assert run.returncode == 0, run.stderr
    return only_line(run.stdout)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
