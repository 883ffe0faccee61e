"""For the tests that need a GPU: random llamas, and runners over them on either device."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from tests.device import ROOT
from tests.unit.engine.conftest import make_llama as make_llama
from tests.unit.engine.conftest import one_thread as one_thread

DEMO = ROOT / "models" / "demo"
_WORDS = (
    "In the beginning God created the heaven and the earth and the evening and the morning were "
    "the first day then said he unto them let there be light and it was so"
).split()
MakeRunner = Callable[..., ModelRunner]


def text_of(num_words: int) -> str:
    """Of the kind that the demo model was trained with; the same for the same number."""
    return " ".join(random.Random(num_words).choices(_WORDS, k=num_words))


@pytest.fixture
def make_gpu_runner() -> MakeRunner:
    """bfloat16 over the Triton kernels unless the fields of EngineConfig say otherwise."""

    def make(model_dir: Path, **fields: Any) -> ModelRunner:
        defaults = {"num_blocks": 128, "max_num_seqs": 8, "token_budget": 512}
        return ModelRunner(
            EngineConfig(model_dir, "cuda", **{"kernels": "triton", **defaults, **fields})
        )

    return make


@pytest.fixture
def make_reference() -> MakeRunner:
    """float32 on the CPU over the torch kernels: what the others are measured by."""

    def make(model_dir: Path) -> ModelRunner:
        return ModelRunner(EngineConfig(model_dir, "cpu", "float32", num_blocks=128))

    return make
