"""What is installed has one name, and all that is imported by it."""

from __future__ import annotations

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from tests.device import ROOT

# Hugging Face has a package `kernels`; `shared`, `services` and `tests` are anybody's.
OUR_NAME = "baton"


@pytest.mark.parametrize("builder", [WheelBuilder, SdistBuilder])
def test_it_holds_what_the_checkout_imports_under_one_name(
    builder: type[WheelBuilder] | type[SdistBuilder],
) -> None:
    """An sdist is what a wheel is built from."""
    files = {file.distribution_path for file in builder(str(ROOT)).recurse_included_files()}
    assert {file.partition("/")[0] for file in files} == {OUR_NAME}

    # The links of the checkout, each with all that is behind it; the stubs once, where they are
    # imported.
    importable = {path.name for path in (ROOT / OUR_NAME).iterdir()} - {"__pycache__"}
    assert {file.split("/")[1] for file in files} == importable
    for name in importable - {"__init__.py"}:
        folder = (ROOT / OUR_NAME / name).resolve()
        expected = {
            f"{OUR_NAME}/{name}/{path.relative_to(folder)}"
            for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        expected = {file for file in expected if not file.startswith(f"{OUR_NAME}/shared/gen/")}
        assert expected and {f for f in files if f.startswith(f"{OUR_NAME}/{name}/")} == expected
