"""Quantised weights, of a GGUF file: split equals together, whatever fails."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from baton.shared.model_files.gguf.directory import write_directory
from tests.e2e.harness import Stack
from tests.e2e.oracle import Ask, Oracle
from tests.faults.streams import Background
from tests.unit.launcher.made_up_gguf import Q4_1, Q8_0, SMOLLM_TOKENS, llama, write_llama

pytestmark = [pytest.mark.e2e, pytest.mark.exact]

_KINDS = {
    **{f"attn_{name}": Q4_1 for name in ("q", "k", "v", "output")},
    **{f"ffn_{name}": Q4_1 for name in ("gate", "up", "down")},
    "token_embd": Q8_0,
}


def test_split_equals_together(tmp_path: Path) -> None:
    """A block corrupted in the hand-off, and a decode worker killed in mid-stream."""
    write_llama(tmp_path / "model.gguf", llama(), kinds=_KINDS)
    write_directory(tmp_path / "model.gguf", tmp_path, generation={})
    source = random.Random(7)
    samplings: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.9, "top_p": 0.9, "seed": 4},
    )
    asks = [
        Ask(source.choices(range(3, len(SMOLLM_TOKENS)), k=each), {"max_tokens": 40, **sampling})
        for each, sampling in zip((20, 150, 75), samplings, strict=True)
    ]
    with Stack(
        tmp_path,
        tmp_path / "stack",
        {"p0": "prefill", "d0": "decode"},
        flags=["--token-budget", "48"],
        failpoints={"p0": "corrupt_sealed_block", "d0": "slow_steps"},
    ) as stack:
        streams = [Background(stack, ask.prompt, ignore_eos=True, **ask.sampling) for ask in asks]
        stack.wait_until(lambda: sum(stream.num_tokens for stream in streams) > 15)
        stack.kill("d0")
        stack.restart("d0")
        results = [stream.result() for stream in streams]
        assert [result.token_ids for result in results] == Oracle(tmp_path).answers(asks)
        assert sum(result.attempts for result in results) > len(results)
        stack.assert_idle()
