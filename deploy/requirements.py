"""Prints what pyproject.toml requires, one requirement a line: `requirements.py [EXTRA ...]`.

For the image and its wheelhouse: both need the dependencies without the project itself.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Those of the project and of `extras`. KeyError names an extra that there is not."""
    project = tomllib.loads(pyproject.read_text())["project"]
    found: list[str] = list(project["dependencies"])
    for extra in extras:
        found += project["optional-dependencies"][extra]
    return found


if __name__ == "__main__":
    sys.stdout.writelines(
        f"{line}\n" for line in requirements(Path("pyproject.toml"), sys.argv[1:])
    )
