"""What the roles tell Prometheus agrees with what their clients saw; probes follow readiness."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.harness import Result, Stack
from tests.e2e.launched import ask

pytestmark = pytest.mark.e2e

NAMES = ("p0", "d0", "gateway")
MAX_TOKENS = 12
LABELS = {"model_name": "", "engine": "gateway"}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def stack(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    variables = {"BATON_METRICS_PORT": "0", "BATON_LOG_FORMAT": "json", "BATON_LOG_LEVEL": "debug"}
    with Stack(
        tiny_model,
        tmp_path_factory.mktemp("metrics"),
        {"p0": "prefill", "d0": "decode"},
        environments={name: {**variables, "BATON_HTTP_PORT": "0"} for name in NAMES},
    ) as stack:
        LABELS["model_name"] = tiny_model.name
        yield stack


def http_get(address: str, path: str) -> tuple[int, str]:
    connection = HTTPConnection(address, timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def scrape(address: str) -> Samples:
    status, text = http_get(address, "/metrics")
    assert status == 200
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a name twice"
    samples = [sample for family in families for sample in family.samples]
    return {(s.name, frozenset(s.labels.items())): s.value for s in samples}


class Deltas:
    """Of one process, from now on."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._address = stack.processes[name].addresses["metrics"]
        self._before = scrape(self._address)

    def __call__(self, name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        # What never happened has no series yet.
        return scrape(self._address).get(key, 0.0) - self._before.get(key, 0.0)


def make_prompt(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 512) for _ in range(length)]


def test_values_agree_with_what_the_client_saw(stack: Stack) -> None:
    gateway, prefill, decode = (Deltas(stack, name) for name in ("gateway", "p0", "d0"))
    pulled_before = stack.state("d0").counters.num_pulled_blocks
    prompts = [make_prompt(1, 40), make_prompt(2, 100), make_prompt(3, 64)]
    # The first prompt again: its blocks are cached on both sides.
    results = [stack.generate(p, max_tokens=MAX_TOKENS) for p in (*prompts, prompts[0])]

    num_prompt = sum(result.num_prompt_tokens for result in results)
    num_cached = sum(result.finished.usage.num_cached_tokens for result in results)
    assert num_cached == 32
    num_tokens = MAX_TOKENS * len(results)

    assert gateway("baton_requests_total", status="OK") == len(results)
    assert gateway("baton_admitted_requests_total") == len(results)
    assert gateway("baton_attempts_total") == sum(result.attempts for result in results)
    success = gateway("vllm:request_success_total", **LABELS, finished_reason="length")
    assert success == len(results)
    for name, expected_sum in (
        ("request_prompt_tokens", num_prompt),
        ("request_generation_tokens", num_tokens),
        ("time_to_first_token_seconds", seconds(results, "ttft")),
        ("e2e_request_latency_seconds", seconds(results, "e2e")),
        ("request_decode_time_seconds", seconds(results, "e2e") - seconds(results, "ttft")),
        ("request_time_per_output_token_seconds", seconds(results, "tpot")),
    ):
        assert gateway(f"vllm:{name}_count", **LABELS) == len(results)
        assert gateway(f"vllm:{name}_sum", **LABELS) == pytest.approx(expected_sum, abs=1e-3)
    gaps = gateway("vllm:inter_token_latency_seconds_count", **LABELS)
    assert 1 <= gaps <= num_tokens - len(results)
    sum_of_gaps = gateway("vllm:inter_token_latency_seconds_sum", **LABELS)
    between = seconds(results, "e2e") - seconds(results, "ttft")
    assert sum_of_gaps == pytest.approx(between, abs=1e-3)
    queued = gateway("vllm:request_queue_time_seconds_sum", **LABELS)
    computed = gateway("vllm:request_prefill_time_seconds_sum", **LABELS)
    assert queued + computed == pytest.approx(seconds(results, "ttft"), abs=1e-3)

    at_p0, at_d0 = ({**LABELS, "engine": name} for name in ("p0", "d0"))
    # Each token at one of the two. An engine that does not answer a scrape at once leaves it with
    # what it said before.
    stack.wait_until(lambda: prefill("vllm:generation_tokens_total", **at_p0) == len(results))
    num_decoded = num_tokens - len(results)
    stack.wait_until(lambda: decode("vllm:generation_tokens_total", **at_d0) == num_decoded)
    assert prefill("vllm:prefix_cache_queries_total", **at_p0) == num_prompt
    assert prefill("vllm:prefix_cache_hits_total", **at_p0) == num_cached
    assert prefill("baton_computed_prompt_tokens_total") == num_prompt - num_cached
    steps = [decode("baton_step_seconds_count", kind=kind) for kind in ("decode", "mixed")]
    assert sum(steps) == decode("baton_steps_total") > 0

    num_pulled = stack.state("d0").counters.num_pulled_blocks - pulled_before
    assert num_pulled == sum(-(-len(prompt) // 16) for prompt in prompts) + 1
    assert decode("baton_pulled_blocks_total") == num_pulled
    # Layers, K and V, tokens, heads, head size, bytes of a float32.
    block_bytes = 3 * 2 * 16 * 2 * 24 * 4
    assert decode("baton_pulled_bytes_total") == num_pulled * block_bytes
    assert decode("baton_handoff_bytes_sum") == num_pulled * block_bytes
    assert decode("baton_handoff_seconds_count") == len(results)
    assert decode("baton_handoff_seconds_sum") == pytest.approx(
        seconds(results, "transfer"), abs=1e-3
    )


def seconds(results: list[Result], name: str) -> float:
    """Summed, as the client was told."""
    durations = [getattr(result.finished.timing, f"{name}_time") for result in results]
    return sum(float(duration.seconds + duration.nanos / 1e9) for duration in durations)


def told_when(stack: Stack, name: str, **wanted: float) -> dict[str, float]:
    """What a worker tells without labels, once it tells this: see above."""
    values: dict[str, float] = {}

    def is_told() -> bool:
        scraped = scrape(stack.processes[name].addresses["metrics"])
        values.update({sample: value for (sample, labels), value in scraped.items() if not labels})
        return wanted.items() <= values.items()

    stack.wait_until(is_told)
    return values


def test_state_of_workers_and_of_the_cluster(stack: Stack) -> None:
    stack.generate(make_prompt(4, 40), max_tokens=2)
    stack.assert_idle()
    for name in ("p0", "d0"):
        state = stack.state(name)
        num_cached = state.num_cached_blocks
        values = told_when(stack, name, baton_cached_blocks=num_cached, baton_directory_reachable=1)
        assert values["baton_blocks"] == state.num_blocks == 512
        assert values["baton_free_blocks"] == state.num_free_blocks
        assert values["baton_cached_blocks"] == state.num_cached_blocks > 0
        assert values["baton_waiting_sequences"] == values["baton_running_sequences"] == 0
        assert values["baton_draining"] == 0
    rates = scrape(stack.processes["d0"].addresses["metrics"])
    assert rates["baton_path_bytes_per_second", frozenset({("peer", "p0")})] > 0

    labels = frozenset(LABELS.items())
    loads = [
        (f"vllm:{name}", labels)
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    ]
    address = stack.processes["gateway"].addresses["metrics"]
    # Until the next heartbeat the gateway knows less.
    stack.wait_until(lambda: not any(scrape(address)[load] for load in loads))
    gateway = scrape(address)
    for role, num in (("prefill", 1), ("decode", 1), ("both", 0)):
        labels = frozenset({("role", role), ("healthy", "true")})
        assert gateway["baton_workers", labels] == num


def test_refusals_and_cancels_have_their_status(stack: Stack) -> None:
    gateway, decode = Deltas(stack, "gateway"), Deltas(stack, "d0")
    with pytest.raises(grpc.RpcError):
        stack.generate([3], temperature=-1.0)
    assert gateway("baton_requests_total", status="INVALID_ARGUMENT") == 1

    stream = stack.start(make_prompt(5, 40), max_tokens=2000)
    for response in stream:
        if response.HasField("chunk"):
            break
    stream.cancel()  # type: ignore[attr-defined]
    stack.wait_until(lambda: gateway("baton_requests_total", status="CANCELLED") == 1)
    stack.wait_until(lambda: decode("baton_aborted_sequences_total") == 1)
    assert gateway("baton_cancelled_requests_total") == 1
    stack.assert_idle()


def test_the_http_port_has_the_same_metrics(stack: Stack) -> None:
    addresses = stack.processes["gateway"].addresses
    status, text = http_get(addresses["http"], "/metrics")
    assert status == 200
    names = {family.name for family in text_string_to_metric_families(text)}
    assert names == {
        family.name
        for family in text_string_to_metric_families(http_get(addresses["metrics"], "/metrics")[1])
    }


def test_each_request_is_one_line_of_the_gateways_log(stack: Stack) -> None:
    result = stack.generate(make_prompt(6, 40), max_tokens=4)
    lines = stack.processes["gateway"].log.read_text().splitlines()
    events = [json.loads(line) for line in lines]
    mine = [event for event in events if event.get("request_id") == result.request_id]
    assert [event["event"] for event in mine] == ["request admitted", "request ended"]
    ended = mine[1]
    assert (ended["status"], ended["attempt"], ended["num_tokens"]) == ("OK", 1, 4)
    assert (ended["prefill"], ended["decode"]) == ("p0", "d0")
    assert 0 < ended["ttft_s"] <= ended["e2e_s"]
    assert not re.search(r"token_ids|\btext\b", "\n".join(lines)), "nothing of the client's"


def test_probes(stack: Stack, tmp_path: Path) -> None:
    services = {"gateway": "gateway", "p0": "prefill", "d0": "decode"}
    for name, service in services.items():
        process = stack.processes[name]
        assert http_get(process.addresses["metrics"], "/health")[0] == 200
        assert ask(tmp_path, "health", process.address).returncode == 0
        assert ask(tmp_path, "health", process.address, "--service", service).returncode == 0
    wrong = ask(tmp_path, "health", stack.processes["p0"].address, "--service", "decode")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and "NOT_FOUND" in wrong.stderr
    gone = ask(tmp_path, "health", "127.0.0.1:1")
    assert gone.returncode == 1 and "UNAVAILABLE" in gone.stderr
