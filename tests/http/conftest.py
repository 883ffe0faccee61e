"""A stack with the OpenAI endpoint; one for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.device import ROOT
from tests.e2e.harness import Stack

DEMO = ROOT / "models/demo"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The demo model: prefill, decode and a gateway with both doors."""
    workers = {"prefill-0": "prefill", "decode-0": "decode"}
    directory = tmp_path_factory.mktemp("http")
    environments = {"gateway": {"BATON_HTTP_PORT": "0"}}
    with Stack(DEMO, directory, workers, environments=environments) as running:
        yield running


@pytest.fixture(scope="module")
def http(stack: Stack) -> str:
    """HOST:PORT of the OpenAI endpoint."""
    return stack.processes["gateway"].addresses["http"]
