"""The metrics port: what it answers, and that nobody can occupy it for long."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http.client import HTTPConnection, RemoteDisconnected

import pytest
from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families

from baton.shared import metrics
from baton.shared.metrics import MetricsServer, new_registry
from tests.ipv6 import needs_ipv6


class State:
    is_ready = False


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def server(state: State, monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricsServer]:
    registry = new_registry()
    Counter("baton_cups", "Cups of tea", registry=registry).inc(3)
    monkeypatch.setattr(metrics, "_MAX_CONNECTIONS", 4)
    monkeypatch.setattr(metrics._Handler, "timeout", 0.2)
    server = MetricsServer("127.0.0.1", 0, registry, lambda: state.is_ready)
    yield server
    server.close()


def get(server: MetricsServer, path: str) -> tuple[int, str]:
    connection = HTTPConnection(server.address, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_metrics_of_the_registry_and_of_the_process(server: MetricsServer) -> None:
    status, text = get(server, "/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["baton_cups"].samples[0].value == 3
    assert {"process_cpu_seconds", "python_info", "python_gc_collections"} <= set(families)


def test_health_follows_readiness(server: MetricsServer, state: State) -> None:
    assert get(server, "/health")[0] == 503
    state.is_ready = True
    assert get(server, "/health")[0] == 200


@pytest.mark.parametrize("path", ["/", "/metricsx", "/../etc/passwd"])
def test_nothing_else_is_there(server: MetricsServer, path: str) -> None:
    assert get(server, path)[0] == 404


def test_connections_that_say_nothing_are_closed(server: MetricsServer) -> None:
    host, _, port = server.address.rpartition(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(12)]
    try:
        for connection in idle:
            connection.settimeout(10)
            assert connection.recv(1) == b""
    finally:
        for connection in idle:
            connection.close()
    assert get(server, "/metrics")[0] == 200


def test_more_connections_than_its_limit_are_refused(server: MetricsServer) -> None:
    host, _, port = server.address.rpartition(":")
    for _ in range(4):
        assert server._server._free.acquire(timeout=10)
    with pytest.raises((RemoteDisconnected, ConnectionResetError)):
        get(server, "/metrics")
    server._server._free.release()
    assert get(server, "/metrics")[0] == 200


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6(host: str) -> None:
    server = MetricsServer(host, 0, new_registry(), lambda: True)
    try:
        assert server.address.startswith("[::1]:")
        assert get(server, "/health")[0] == 200
    finally:
        server.close()


def test_a_port_that_is_taken_is_named(server: MetricsServer) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(OSError, match=rf"--metrics-port: cannot listen on 127.0.0.1:{port}: "):
        MetricsServer("127.0.0.1", port, new_registry(), lambda: True)
