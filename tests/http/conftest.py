"""The stack's OpenAI endpoint."""

from __future__ import annotations

import pytest

from tests.device import ROOT
from tests.e2e.harness import Stack

DEMO = ROOT / "models/demo"


@pytest.fixture
def stack(demo_stack: Stack) -> Stack:
    return demo_stack


@pytest.fixture(scope="session")
def http(demo_stack: Stack) -> str:
    """HOST:PORT of the OpenAI endpoint."""
    return demo_stack.processes["gateway"].addresses["http"]
