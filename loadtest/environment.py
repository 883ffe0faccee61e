"""What a measurement depends on beside the code: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("baton-llm", "torch", "transformers", "grpcio", "numpy")


def describe_environment() -> dict[str, str]:
    """Names and values, to be printed and recorded with every result."""
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "load_before": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        **_versions(_PACKAGES),
        **_gpu(),
        **_commit(),
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _gpu() -> dict[str, str]:
    """About the first GPU; empty where there is none."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0")
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        name, _, driver = line.partition(", ")
        return {"gpu": name, "driver": driver, **_versions(["triton"])}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> dict[str, str]:
    """The commit of the checkout that this code is in; empty where it was installed, even inside
    some other repository."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return {}
    git = ("git", "-C", str(checkout), "describe", "--always", "--dirty")
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown"}
    return {"commit": done.stdout.strip()}
