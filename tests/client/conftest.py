from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.asking import Asker
from tests.e2e.launched import Launched


@pytest.fixture(params=["sync", "async"])
def asker(request: pytest.FixtureRequest) -> Asker:
    return Asker(request.param)


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """`baton up` with the demo model, ready."""
    arguments = ["up", "--port", "0", "--model", "models/demo", "--prefill", "1", "--decode", "1"]
    launched = Launched(tmp_path_factory.mktemp("stack"), "baton.services.launcher", *arguments)
    try:
        launched.wait_ready()
        yield launched
    finally:
        launched.process.terminate()
        launched.wait_exit()
