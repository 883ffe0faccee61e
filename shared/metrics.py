"""Prometheus metrics of one process, and the port where they are read.

    GET /metrics    text or OpenMetrics, as the scraper asks
    GET /health     200 when the process would take a request, else 503

Counts that the process keeps anyway are read when somebody scrapes; only times and sizes, which
have to be taken as they happen, are observed. The port has threads of its own, so that it answers
while the process loads a model or computes. It is meant for the operator's network.
"""

from __future__ import annotations

import argparse
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from baton.shared.rpc.flags import add_flag, optional_port
from baton.shared.rpc.serve import bare_host, join_address

SECONDS_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0),
)
"""From a step to an answer of many thousand tokens."""
TOKENS_BUCKETS = tuple(float(2**n) for n in range(18))
BYTES_BUCKETS = tuple(float(2**n) for n in range(14, 36, 2))

_MAX_CONNECTIONS = 16
_CONNECTION_S = 5.0
"""Without a byte, a connection is closed."""


def add_metrics_flag(parser: argparse.ArgumentParser) -> None:
    """`--metrics-port`, where a MetricsServer listens."""
    add_flag(
        parser,
        "--metrics-port",
        type=optional_port,
        help="port of /metrics and /health over HTTP, on --host; 0 picks one; default: none",
    )


def new_registry() -> CollectorRegistry:
    """A registry with what the interpreter and the kernel know of this process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def counter(name: str, help: str, value: float, labels: Mapping[str, str] | None = None) -> Metric:
    """A counter's present value; `name` without `_total`."""
    labels = labels or {}
    family = CounterMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def counters_of(
    name: str, help: str, labels: Iterable[str], values: Mapping[tuple[str, ...], float]
) -> Metric:
    """As `counter`, one value for each combination of the labels' values."""
    family = CounterMetricFamily(name, help, labels=list(labels))
    for label_values, value in values.items():
        family.add_metric(list(label_values), value)
    return family


def gauge(name: str, help: str, value: float, labels: Mapping[str, str] | None = None) -> Metric:
    labels = labels or {}
    family = GaugeMetricFamily(name, help, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def gauges(
    name: str, help: str, labels: Iterable[str], values: Mapping[tuple[str, ...], float]
) -> Metric:
    """One value for each combination of the labels' values."""
    family = GaugeMetricFamily(name, help, labels=list(labels))
    for label_values, value in values.items():
        family.add_metric(list(label_values), value)
    return family


def info(name: str, help: str, labels: Mapping[str, str]) -> Metric:
    """A gauge that is always 1: what it tells is in its labels."""
    return gauge(name, help, 1, labels)


class MetricsServer:
    """Serves `registry` and the answer of `is_ready` from now on, in daemon threads."""

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, is_ready: Callable[[], bool]
    ) -> None:
        """`port` 0 picks one. Raises OSError when it can't listen; its message names the flag."""
        try:
            self._server = _Server(host, port, _application(registry, is_ready))
        except OSError as error:
            where = f"--metrics-port: cannot listen on {join_address(host, port)}"
            raise OSError(f"{where}: {error.strerror or error}") from error
        self.address = join_address(host, self._server.server_port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    timeout = _CONNECTION_S

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is not worth a line."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # A connection that hangs must not keep the process from ending.
    block_on_close = False

    def __init__(self, host: str, port: int, application: Any) -> None:
        host = bare_host(host)
        self.address_family = _family(host)
        self._free = threading.Semaphore(_MAX_CONNECTIONS)
        super().__init__((host, port), _Handler)
        self.set_app(application)

    def server_bind(self) -> None:
        # The library's own would look up the host's name, which may take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nor is a scraper that went away."""


def _family(host: str) -> socket.AddressFamily:
    [(family, *_), *_] = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return family


def _application(registry: CollectorRegistry, is_ready: Callable[[], bool]) -> Any:
    metrics = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/metrics":
            return metrics(environ, start_response)
        status, text = "404 Not Found", "/metrics and /health are here\n"
        if environ["PATH_INFO"] == "/health":
            status, text = "200 OK", "ready\n"
            if not is_ready():
                status, text = "503 Service Unavailable", "not ready\n"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [text.encode()]

    return application
