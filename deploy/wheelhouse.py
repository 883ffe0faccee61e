"""Downloads what the image installs, for the image's own Python: `make wheelhouse`.

pip chooses wheels for another Python when it is told to, but asks of the Python that runs it which
requirements hold (`python_full_version < "3.11.3"`): here it is told that as well.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from pip._internal.cli.main import main as pip
from pip._internal.commands import create_command
from pip._vendor.packaging import markers

from deploy.requirements import requirements

EXTRAS = {"cpu": ["worker"], "cuda": ["worker", "nixl"]}
_LATEST_GLIBC = 36
"""Minor version: that of Debian 12."""
_FIRST = "hatchling"
"""Is needed, is small, and comes at once where anything does."""
_AT_ONCE = ("--no-deps", "--retries=0", "--timeout=10")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m deploy.wheelhouse")
    parser.add_argument("--device", choices=sorted(EXTRAS), default="cpu", help="the image's")
    parser.add_argument("--base", required=True, help="the image that the build starts from")
    parser.add_argument(
        "--python", metavar="X.Y.Z", help="its Python; default: what the engine says of --base"
    )
    parser.add_argument(
        "more", nargs="*", help="requirements, or further options of pip (after --)"
    )
    args = parser.parse_args()
    python = args.python or _python_of(args.base)
    target = Path("wheelhouse") / args.device
    target.mkdir(parents=True, exist_ok=True)
    (target.parent / ".gitignore").write_text("*\n")
    needed = requirements(Path("pyproject.toml"), EXTRAS[args.device])
    sys.stdout.write(f"{target}: for Python {python}\n")
    code = download(python, target, [*needed, _FIRST, "grpcio-tools", *args.more])
    if code == 0:
        # The build compares it with its own.
        (target / "python.txt").write_text(f"{python}\n")
    return code


def download(python: str, target: Path, arguments: list[str]) -> int:
    """Runs pip's download as if under that Python; its exit code. Of an index that does not answer
    it is known within seconds: pip itself would go on asking for minutes."""
    plain: Any = markers.default_environment

    def of_image() -> Any:
        short = ".".join(python.split(".")[:2])
        found = {"python_full_version": python, "python_version": short}
        return {**plain(), **found, "implementation_version": python}

    machine = platform.machine()
    glibc = [f"manylinux_2_{minor}_{machine}" for minor in range(_LATEST_GLIBC, 4, -1)]
    short = "".join(python.split(".")[:2])
    options = [
        *("download", "--disable-pip-version-check", "--quiet", "--only-binary", ":all:"),
        *("--python-version", python, "--implementation", "cp"),
        *(f"--abi={abi}" for abi in (f"cp{short}", "abi3", "none")),
        *(f"--platform={name}" for name in (*glibc, f"manylinux2014_{machine}", "any")),
        *("--constraint", "constraints.txt", "--dest", str(target)),
    ]
    markers.default_environment = of_image
    try:
        if code := pip([*options, *_AT_ONCE, *_without_requirements(arguments), _FIRST]):
            sys.stderr.write(
                f"wheelhouse: {_FIRST} did not come: no package index answers, or it has none "
                'fit for this Python; name another: PIP_ARGS="--index-url URL"\n'
            )
            return code
        return pip([*options, *arguments])
    finally:
        markers.default_environment = plain


def _without_requirements(arguments: list[str]) -> list[str]:
    """pip's options alone, such as which index to ask."""
    _, requirements_of = create_command("download").parse_args(arguments)
    return [each for each in arguments if each not in requirements_of]


def _python_of(base: str) -> str:
    program = "import platform; print(platform.python_version())"
    command = ["docker", "run", "--rm", "--entrypoint", "python3", base, "-c", program]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        problem = f"the Python of {base} is not known ({said[-1]})"
        sys.exit(f"wheelhouse: {problem}; name it: PYTHON_OF_IMAGE=3.11.2")


if __name__ == "__main__":
    sys.exit(main())
