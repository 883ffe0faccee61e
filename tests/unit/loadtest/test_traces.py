"""Traces: what is read, what is made of it, and a synthetic one of the same form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from baton.loadtest.conversations import workload_of
from baton.loadtest.spec import Load, LoadError
from baton.loadtest.synthetic_trace import Shape, main, synthetic_trace
from baton.loadtest.traces import read_trace, replay

MOONCAKE = [
    {"timestamp": 2000, "input_length": 1030, "output_length": 20, "hash_ids": [0, 7, 8]},
    {"timestamp": 3000, "input_length": 600, "output_length": 500, "hash_ids": [0, 9]},
    {"timestamp": 9000, "input_length": 512, "output_length": 1, "hash_ids": [7]},
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in MOONCAKE))
    return path


def load_of(path: Path, **changes: object) -> Load:
    return replace(Load("grpc://nobody:1", arrivals="trace", trace=str(path)), **changes)  # type: ignore[arg-type]


def prompts(load: Load) -> list[list[int]]:
    made = workload_of(load)
    assert made.num_conversations is not None
    return [made.conversation(n)[0].token_ids(load) for n in range(made.num_conversations)]


def test_equal_blocks_are_equal_tokens(mooncake: Path) -> None:
    load = load_of(mooncake)
    assert workload_of(load).arrivals == [0.0, 1.0, 7.0]
    first, second, third = prompts(load)
    assert [len(first), len(second), len(third)] == [1030, 600, 512]
    assert first[:512] == second[:512] and first[512:600] != second[512:]
    assert third == first[512:1024]


def test_scales_window_and_caps(mooncake: Path) -> None:
    load = load_of(mooncake, time_scale=0.1, length_scale=0.5, max_prompt=400, max_output=30)
    made = workload_of(load)
    assert made.arrivals == pytest.approx([0.0, 0.1, 0.7])
    first, second, third = prompts(load)
    assert [len(first), len(second), len(third)] == [400, 300, 256]
    assert first[:256] == second[:256]
    outputs = [made.conversation(n)[0].output_tokens for n in range(3)]
    assert outputs == [10, 30, 1]
    assert made.notes == (
        "1 of 3 prompts capped at 400 tokens",
        "1 of 3 answers capped at 30 tokens",
        "lengths times 0.5: a block of the trace is 256 tokens",
    )
    assert workload_of(load_of(mooncake, window_s=(0.5, 7.0))).arrivals == [0.5]
    assert workload_of(load_of(mooncake, num_requests=2)).arrivals == [0.0, 1.0]
    assert workload_of(load_of(mooncake, duration_s=0.5, time_scale=0.1)).arrivals == [0.0, 0.1]


def test_azure_prompts_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    load = load_of(path)
    assert workload_of(load).arrivals == pytest.approx([0.0, 4.314579], abs=1e-5)
    first, second = prompts(load)
    assert (len(first), len(second)) == (374, 396) and first[:50] != second[:50]
    assert [request.output_tokens for request in replay(load).requests] == [44, 109]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "the file is empty"),
        ("some,thing\n1,2\n", "neither JSON lines .* nor a CSV"),
        ('{"timestamp": 1}\n', "line 1: no field 'input_length'"),
        (json.dumps(MOONCAKE[0]) + "\n{not json\n", "line 2: "),
        ('{"timestamp": 1, "input_length": -5, "output_length": 1}\n', "a negative length"),
        (
            '{"timestamp": 1, "input_length": 999, "output_length": 1, "hash_ids": [1]}\n',
            "1 blocks for 999 prompt tokens",
        ),
        (AZURE + "yesterday,1,2\n", "line 4: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_line(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(LoadError, match=problem) as raised:
        read_trace(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="No such file"):
        read_trace(tmp_path / "nowhere")
    with pytest.raises(LoadError, match="Is a directory"):
        read_trace(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError, match="not UTF-8"):
        read_trace(tmp_path / "binary")


def test_an_empty_window_is_told(mooncake: Path) -> None:
    with pytest.raises(LoadError, match="no request within the window"):
        workload_of(load_of(mooncake, window_s=(100.0, 200.0)))


def test_a_synthetic_trace_is_read_as_a_real_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--requests", "300", "--rate", "10"]) == 0
    path = tmp_path / "made.jsonl"
    path.write_text(capsys.readouterr().out)
    found = read_trace(path)
    assert len(found) == 300
    assert found[-1].at_s == pytest.approx(30, rel=0.4)
    blocks = [block for request in found for block in request.blocks]
    assert len(set(blocks)) < 0.8 * len(blocks)
    shape = Shape(num_requests=50)
    assert list(synthetic_trace(shape)) == list(synthetic_trace(shape))
    for entry in synthetic_trace(shape):
        ids = entry["hash_ids"]
        assert isinstance(ids, list) and len(ids) == len(set(ids))
        assert -(-int(str(entry["input_length"])) // 512) == len(ids)
