"""What metrics say of a load beside what its clients saw: figures, and what cannot be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from baton.loadtest.metrics_check import Figure, MetricsCheck, Scrape, compare, read
from baton.loadtest.report import Report, Run
from baton.loadtest.samples import Offered, Sample, summarise
from baton.loadtest.scrape import Before, Source, before, sources_of
from baton.loadtest.spec import LoadError
from baton.loadtest.target import Target


class Gateway:
    """As much of a gateway's metrics as is looked at."""

    def __init__(self, incarnation: str = "one") -> None:
        self._registry = CollectorRegistry()
        info = Gauge("baton_build_info", "", ["incarnation"], registry=self._registry)
        info.labels(incarnation).set(1)
        self.requests = self._counter("baton_requests", "status")
        self.success = self._counter("vllm:request_success", "finished_reason")
        self.prompt = self._histogram("vllm:request_prompt_tokens")
        self.output = self._histogram("vllm:request_generation_tokens")
        self.ttft = self._histogram("vllm:time_to_first_token_seconds")

    def _counter(self, name: str, label: str) -> Counter:
        return Counter(name, "", [label], registry=self._registry)

    def _histogram(self, name: str) -> Histogram:
        return Histogram(name, "", registry=self._registry)

    def answered(self, num_prompt: int, num_output: int, ttft_s: float, why: str = "stop") -> None:
        self.requests.labels("OK").inc()
        self.success.labels(why).inc()
        self.prompt.observe(num_prompt)
        self.output.observe(num_output)
        self.ttft.observe(ttft_s)

    @property
    def text(self) -> str:
        return generate_latest(self._registry).decode()

    def scrape(self) -> Scrape:
        return read(self.text)


def sample(**changes: object) -> Sample:
    fields = {"at_s": 0.0, "ttft_s": 0.5, "e2e_s": 1.0, "num_tokens": 3, "num_prompt_tokens": 10}
    return Sample(**(fields | {"status": "OK"} | changes))  # type: ignore[arg-type]


def figures(check: MetricsCheck) -> dict[str, tuple[float | None, float | None]]:
    return {one.name: (one.clients, one.metrics) for one in (*check.counts, *check.times)}


def test_what_was_gained_since_stands_beside_what_clients_saw() -> None:
    gateway, worker = Gateway(), "vllm:prefix_cache_hits_total{{engine='p0'}} {}\n"
    gateway.answered(1000, 1000, 9.0)
    gateway.requests.labels("CANCELLED").inc()
    old, old_worker = gateway.scrape(), read(worker.format(7).replace("'", '"'))
    gateway.answered(10, 3, 0.25)
    # A reason that came for the first time.
    gateway.answered(10, 3, 0.75, "length")
    gateway.requests.labels("UNAVAILABLE").inc()
    new, new_worker = gateway.scrape(), read(worker.format(15).replace("'", '"'))
    seen = [sample(num_cached_tokens=8, ttft_s=0.6), sample(), sample(status="UNAVAILABLE")]
    check = compare(["a", "b"], [(old, new), (old_worker, new_worker)], seen)
    assert figures(check) == {
        "answered": (2, 2),
        "not answered": (1, 1),
        "prompt tokens": (20, 20),
        "output tokens": (6, 6),
        "cached tokens": (8, 8),
        "TTFT mean ms": (pytest.approx(550), pytest.approx(500)),
    }
    assert not check.problems
    (ttft,) = check.times
    assert ttft.difference_percent == pytest.approx(-100 / 11)
    as_json = json.loads(json.dumps(check.as_dict()))
    assert as_json["figures"]["answered"] == {"clients": 2, "metrics": 2, "difference_percent": 0}


def test_gateways_are_added_and_a_stranger_is_noticed() -> None:
    first, second = Gateway(), Gateway("two")
    old = [first.scrape(), second.scrape()]
    first.answered(10, 3, 0.5)
    second.answered(10, 3, 0.5)
    pairs = list(zip(old, [first.scrape(), second.scrape()], strict=True))
    assert not compare(["a", "b"], pairs, [sample(), sample()]).problems
    (problem,) = compare(["a", "b"], pairs, [sample()]).problems
    assert "answered 2, the clients 1; prompt tokens 20, the clients 10" in problem
    (problem,) = compare(["a"], pairs[:1], [sample(), sample()]).problems
    assert "answered 1, the clients 2" in problem


def test_what_workers_guessed_is_in_the_report() -> None:
    registry = CollectorRegistry()
    counters = {
        name: Counter(f"vllm:spec_decode_num_{name}", "", ["engine"], registry=registry)
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    }
    name = "vllm:spec_decode_num_accepted_tokens_per_pos"
    by_position = Counter(name, "", ["engine", "position"], registry=registry)

    def scrape(**gained: int) -> Scrape:
        for each, number in gained.items():
            counters[each].labels("d0").inc(number)
        return read(generate_latest(registry).decode())

    old = scrape(drafts=1, draft_tokens=2, accepted_tokens=0)
    assert not compare(["d0"], [(old, scrape(drafts=0))], [sample()]).counts
    by_position.labels("d0", "0").inc(6)
    by_position.labels("d1", "1").inc(3)
    new = scrape(drafts=10, draft_tokens=24, accepted_tokens=9)
    check = compare(["d0"], [(old, new)], [sample()])
    told = {figure.name: figure.metrics for figure in (*check.counts, *check.times)}
    assert told == {
        "drafts": 10,
        "drafted tokens": 24,
        "accepted tokens": 9,
        "accepted at 0": 6,
        "accepted at 1": 3,
        "mean accepted length": 1.9,
    }
    assert not check.problems


def test_what_vllm_counts_as_aborted_was_not_answered() -> None:
    text = 'vllm:request_success_total{{model_name="m",finished_reason="{}"}} {}\n'
    now = read(text.format("stop", 4) + text.format("abort", 3) + text.format("length", 1))
    assert figures(compare(["a"], [(Scrape("", {}), now)], [sample()] * 5)) == {"answered": (5, 5)}


def test_a_difference_of_nothing() -> None:
    assert Figure("x", 0, 0).difference_percent == 0
    assert Figure("x", 0, 3).difference_percent is None
    assert Figure("x", None, 3).difference_percent is None
    assert Figure("x", 4, 3).difference_percent == -25
    assert compare(["a"], [(read("up 1\n"),) * 2], [sample()]).problems


def test_the_table_and_the_page_show_both() -> None:
    check = MetricsCheck(["a"], [Figure("answered", 2, 2)], [Figure("TTFT mean ms", 8, 6)], ["oh"])
    seen = [sample()]
    report = Report("", {}, [Run("r", None, summarise(Offered(seen, 0.1), []), seen, check)])
    table = report.text()
    for line in (r"answered +2 +2 +equal", r"TTFT mean ms +8\.0 +6\.0 +-25\.0 %", "WARNING: oh"):
        assert re.search(line, table)
    assert "metrics say" in report.html() and "r: oh" in report.html()
    (run,) = json.loads(report.json())["runs"]
    assert run["metrics"]["figures"]["TTFT mean ms"]["difference_percent"] == -25


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("http://h:1/metrics", ["http://h:1/metrics"]),
        ("h:1,https://[::1]/x/", ["http://h:1/metrics", "https://[::1]:443/x"]),
        ("h:1,http://h:1", ["http://h:1/metrics"]),
        ("none", []),
    ],
)
def test_where_metrics_are_read(text: str, found: list[str]) -> None:
    assert list(map(str, sources_of(text, Target.parse("http://t:8")))) == found


def test_a_target_that_speaks_http_has_its_own() -> None:
    assert list(map(str, sources_of(None, Target.parse("http://t:8")))) == ["http://t:8/metrics"]
    assert sources_of(None, Target.parse("grpc://t:8")) == []


@pytest.mark.parametrize("text", ["", "grpc://h:1", "http://", "h:1,", "h:port", "h:1/a b"])
def test_an_address_that_is_none_is_told(text: str) -> None:
    with pytest.raises(LoadError, match=f"--metrics {text.split(',')[-1]}: must be http://"):
        sources_of(text, Target.parse("grpc://t:8"))


@contextmanager
def serving(*answers: str | int) -> Iterator[Source]:
    """Answers one after the other, the last again and again: a text, or a status."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = left.pop(0) if len(left) > 1 else left[0]
            body = b"" if isinstance(answer, int) else answer.encode()
            self.send_response(answer if isinstance(answer, int) else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield Source("http", "127.0.0.1", server.server_port, "/metrics")
        server.shutdown()
        thread.join()


async def checked(*sources: Source) -> MetricsCheck:
    check = await (await before(sources)).check([sample()])
    assert check is not None
    return check


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([404], "answers 404"),
        ([Gateway().text, 500], "answers 500"),
        (["<html>no metrics</html>"], "does not answer in Prometheus's text format"),
        ([Gateway().text, Gateway("two").text], "another process than before"),
        (["up 1\n"], "none of the metrics is known"),
    ],
)
async def test_what_cannot_be_read_is_one_line(answers: list[str | int], problem: str) -> None:
    with serving(*answers) as source:
        check = await checked(source)
    (line,) = check.problems
    assert problem in line and not figures(check)


async def test_nobody_at_the_address_is_one_line() -> None:
    with serving(404) as source:
        pass
    (line,) = (await checked(source)).problems
    assert line.startswith(f"no figures of the metrics: {source}: nobody answers")


async def test_a_process_counts_once_whatever_its_addresses() -> None:
    gateway = Gateway()
    old = gateway.text
    gateway.answered(10, 3, 0.5)
    with serving(old, gateway.text) as first, serving(old, gateway.text) as second:
        check = await checked(first, second)
    assert figures(check)["answered"] == (1, 1) and not check.problems


async def test_it_waits_for_what_is_under_way() -> None:
    """The gateway notices later than its client that a request was given up."""
    gateway = Gateway()
    old = gateway.text + "baton_requests_in_flight 0\n"
    meanwhile = gateway.text + "baton_requests_in_flight 1\n"
    gateway.answered(10, 3, 0.5)
    with serving(old, meanwhile, gateway.text + "baton_requests_in_flight 0\n") as source:
        check = await checked(source)
    assert figures(check)["answered"] == (1, 1)


async def test_without_sources_nothing_is_compared() -> None:
    assert await Before((), ()).check([sample()]) is None
