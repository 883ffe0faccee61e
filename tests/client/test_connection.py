"""Reaching the gateway: TLS, tokens, proxies, readiness, and what is refused before that."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from baton_client import (
    AccessDenied,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    ServerError,
    Tls,
    Unavailable,
    Unsupported,
)
from baton_client.connection import Connection, is_loopback

from baton.shared.rpc.errors import Draining, NoTokenizer
from tests.client.asking import Asker
from tests.client.scripted import TOKEN_IDS, ScriptedGateway, Try, aborts, fails


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `gateway.test` and of a client, both signed by themselves."""
    directory = tmp_path_factory.mktemp("certificates")
    for name in ("gateway.test", "client"):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"]
        command += ["-addext", f"subjectAltName=DNS:{name}"]
        subprocess.run(command, cwd=directory, check=True, capture_output=True)
    return directory


def test_tls_with_client_certificate_and_token(asker: Asker, certificates: Path) -> None:
    files = {name: (certificates / name).read_bytes() for name in ("gateway.test.key",
             "gateway.test.pem", "client.pem")}  # fmt: skip
    credentials = grpc.ssl_server_credentials(
        [(files["gateway.test.key"], files["gateway.test.pem"])],
        root_certificates=files["client.pem"],
        require_client_auth=True,
    )
    tls = Tls.from_files(
        certificates / "gateway.test.pem",
        certificates / "client.pem",
        certificates / "client.key",
        server_name="gateway.test",
    )
    tokens = iter(["first", "second"])
    options: dict[str, Any] = {"tls": tls, "token": lambda: next(tokens)}
    broken = Try(3, aborts(grpc.StatusCode.UNAVAILABLE))
    with ScriptedGateway(broken, Try(), credentials=credentials) as gateway:
        outcome = asker.generate(gateway.address, options)
        assert outcome.token_ids == TOKEN_IDS and outcome.error is None
        # Asked for before each request, so that it may have been renewed.
        sent = [metadata["authorization"] for metadata in gateway.metadata]
        assert sent == ["Bearer first", "Bearer second"]
        for wrong in (True, Tls(files["gateway.test.pem"], server_name="gateway.test")):
            refused = asker.generate(gateway.address, {"tls": wrong})
            assert isinstance(refused.error, Unavailable)
        assert len(gateway.requests) == 2
    assert "PRIVATE KEY" not in repr(tls)


def test_token_needs_encryption_or_a_word(asker: Asker) -> None:
    with pytest.raises(ValueError, match="in the open"):
        Client("127.0.0.1:1", token="secret")
    with ScriptedGateway() as gateway:
        options = {"token": "secret", "allow_insecure_token": True}
        asker.call(gateway.address, "tokenize", "x", client=options)
        assert gateway.metadata[0]["authorization"] == "Bearer secret"
        for bad in ("secret\n", "two secrets", "", "sécret"):
            with pytest.raises(ValueError) as raised:
                asker.call(gateway.address, "model_info", client={**options, "token": bad})
            assert "cret" not in str(raised.value)
        assert len(gateway.requests) == 1


def test_refused_token(asker: Asker) -> None:
    denied = Try(0, aborts(grpc.StatusCode.UNAUTHENTICATED, "who are you?"), started=False)
    with ScriptedGateway(denied) as gateway:
        outcome = asker.generate(gateway.address)
        assert len(gateway.requests) == 1
    assert isinstance(outcome.error, AccessDenied) and outcome.error.message == "who are you?"


def test_questions_are_asked_again(asker: Asker) -> None:
    calls: list[tuple[str, tuple[Any, ...], Any]] = [
        ("tokenize", ("ab",), [1, 97, 98]),
        ("detokenize", ([97, 98],), "ab"),
        ("model_info", (), "scripted"),
        ("server_info", (), "1"),
    ]
    for name, arguments, expected in calls:
        with ScriptedGateway() as gateway:
            gateway.unary_endings = [
                fails(Draining("the gateway is shutting down")),
                aborts(grpc.StatusCode.UNAVAILABLE),
            ]
            answer = asker.call(gateway.address, name, *arguments)
            assert len(gateway.requests) == 3
        if name == "model_info":
            answer = answer.model_name
        if name == "server_info":
            answer = answer.version
        assert answer == expected
    with ScriptedGateway() as gateway:
        gateway.unary_endings = [fails(NoTokenizer("the model has no tokenizer"))]
        with pytest.raises(Unsupported, match="no tokenizer"):
            asker.call(gateway.address, "tokenize", "x")
        assert len(gateway.requests) == 1


def test_wait_ready(asker: Asker) -> None:
    with ScriptedGateway() as gateway:
        with pytest.raises(ServerError, match="NOT_FOUND"):  # no waiting helps
            asker.call(gateway.address, "wait_ready", deadline_s=60)
        gateway.set_ready(False)
        with pytest.raises(DeadlineExceeded, match="no workers, or drains"):
            asker.call(gateway.address, "wait_ready", deadline_s=2.0)
        timer = threading.Timer(0.3, gateway.set_ready, [True])
        timer.start()
        asker.call(gateway.address, "wait_ready", deadline_s=60)
        timer.join()
    with pytest.raises(DeadlineExceeded, match="not ready in time: UNAVAILABLE"):
        asker.call(gateway.address, "wait_ready", deadline_s=1.0)


def test_waits_for_a_gateway_that_starts_later(asker: Asker) -> None:
    with ScriptedGateway() as gone:
        address = gone.address
    later = ScriptedGateway(port=int(address.rpartition(":")[2]))
    later.set_ready(True)
    timer = threading.Timer(0.3, later.__enter__)
    timer.start()
    try:
        asker.call(address, "wait_ready", deadline_s=60)
    finally:
        timer.join()
        later.__exit__()


def test_proxy_of_the_environment_is_not_for_loopback(
    asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with ScriptedGateway() as gateway:
        assert asker.generate(gateway.address).token_ids == TOKEN_IDS
        through_proxy = {"options": [("grpc.enable_http_proxy", 1)]}
        assert isinstance(asker.generate(gateway.address, through_proxy).error, Unavailable)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("localhost:1", True),
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/baton.sock", True),
        ("gateway:50051", False),
        ("dns:///gateway.example:50051", False),
        ("10.0.0.1:1", False),
        ("[2001:db8::1]:1", False),
        ("localhost.example:1", False),
    ],
)
def test_is_loopback(target: str, expected: bool) -> None:
    assert is_loopback(target) is expected


def test_what_cannot_work_is_refused_at_once() -> None:
    for wrong, match in (
        ({"target": ""}, "HOST:PORT"),
        ({"target": "x:1", "keepalive_s": 1.0}, "at least 10"),
    ):
        with pytest.raises(ValueError, match=match):
            Connection(**wrong)
    with pytest.raises(ValueError, match="both"):
        Tls(certificate_chain=b"x")


def test_no_message_holds_it() -> None:
    with Client("127.0.0.1:1") as client:
        for wrong, name in (
            ({"prompt": "x", "max_tokens": -1}, "sampling.max_tokens"),
            ({"prompt": "x", "seed": 1 << 64}, "sampling.seed"),
            ({"prompt": "x", "stop_token_ids": [-1]}, "sampling.stop_token_ids"),
            ({"prompt": "x", "logit_bias": {-1: 1.0}}, "sampling.logit_bias"),
            ({"token_ids": [1 << 32]}, "token_ids"),
            ({"prompt": "\ud800"}, "text"),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ):
            with pytest.raises(InvalidRequest) as raised:
                client.generate(**wrong)
            assert raised.value.field == name
        for nonsense in (
            {},
            {"prompt": "x", "token_ids": [1]},
            {"prompt": "x", "messages": []},
            {"messages": [{"role": "user"}]},
            {"messages": [{"role": "user", "content": ["x"]}]},
            {"messages": [{"role": "user", "content": "x", "name": "y"}]},
            {"prompt": "x", "stops": "y"},
            {"prompt": "x", "bad_words": "y"},
            {"prompt": "x", "logit_bias": {"5": 1}},
            {"prompt": "x", "temprature": 1},
            {"prompt": "x", "max_tokens": "many"},
        ):
            with pytest.raises(TypeError):
                client.generate(**nonsense)


def test_options_of_the_caller_win() -> None:
    made = Connection("gateway:1", options=[("grpc.keepalive_time_ms", 7), ("grpc.x", 1)])
    options = dict(made.options)
    assert (options["grpc.keepalive_time_ms"], options["grpc.x"]) == (7, 1)
    assert "grpc.enable_http_proxy" not in options
    unasked = dict(Connection("gateway:1", keepalive_s=None).options)
    assert "grpc.keepalive_time_ms" not in unasked
