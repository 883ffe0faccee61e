from __future__ import annotations

from pathlib import Path

import pytest

from baton.shared.constraints.tokens import TokenTable

DEMO = Path(__file__).parents[3] / "models" / "demo"


@pytest.fixture(scope="session")
def table() -> TokenTable:
    """Of the demo model, as if its vocabulary were padded."""
    table = TokenTable.load(DEMO, 4200)
    assert table is not None
    return table
