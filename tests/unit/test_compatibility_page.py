"""docs/compatibility.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

_TESTS = Path(__file__).parents[1]
_PAGE = _TESTS.parent / "docs/compatibility.md"
_NAMED = re.compile(r"((?:\w+/)*test_\w+\.py)?(?:::(test_\w+))?")


def test_the_tests_that_it_names_are_there() -> None:
    directory, file = _TESTS, _TESTS
    num_named = 0
    for row in _PAGE.read_text(encoding="utf-8").splitlines():
        if not row.startswith("| "):
            continue
        cell = row.rsplit("|", 2)[1]
        for path, name in _NAMED.findall(cell):
            if path:
                # Without a folder: beside the one before.
                file = (_TESTS if "/" in path else directory) / path
                directory = file.parent
                assert file.is_file(), path
                num_named += 1
            if name:
                assert re.search(rf"def {name}\b", file.read_text(encoding="utf-8")), (file, name)
                num_named += 1
    assert num_named > 40
