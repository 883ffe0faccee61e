"""Writes what of `baton_client` is generated: stubs, and the contract as package data.

    python generate_stubs.py            write into src/baton_client
    python generate_stubs.py --check    write nothing; exit 1 and name what differs

Runs in an environment with requirements-stubs.txt alone (`make client-stubs`, `make client-check`):
stubs run with their generator's grpcio and protobuf or newer ones, so the oldest generator decides
for whom the package works.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGE = HERE / "src" / "baton_client"
CONTRACT = ("types", "error_details", "inference_service")
"""Of protos/baton/v1: what the gateway shows to clients."""
# A module, never the proto package in "/baton.v1.InferenceService/Generate".
_MODULE = re.compile(r"\bbaton\.v1(?=\.\w+_pb2|\s+import\b)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when it differs")
    arguments = parser.parse_args()
    made = generate()
    if arguments.check:
        return check(made)
    for path, content in made.items():
        target = PACKAGE / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    for path in stale(made):
        (PACKAGE / path).unlink()
    return 0


def generate() -> dict[Path, bytes]:
    """Files by their path in the package."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        contract = [f"baton/v1/{name}.proto" for name in CONTRACT]
        plugin = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
        _protoc(ROOT / "protos", out, contract, "--grpc_python_out", "--mypy_grpc_out",
                f"--plugin=protoc-gen-mypy_grpc={plugin}")  # fmt: skip
        _protoc(HERE / "protos", out, ["baton_client/wire.proto"])
        made = {Path("v1/__init__.py"): b'"""Stubs of baton.v1, generated from the contract."""\n'}
        for path in sorted((out / "baton" / "v1").iterdir()):
            if is_wanted(path):
                made[Path("v1", path.name)] = rewritten(path.read_text()).encode()
        for path in sorted((out / "baton_client").iterdir()):
            made[Path(path.name)] = path.read_bytes()
        for name in contract:
            made[Path("protos", name)] = (ROOT / "protos" / name).read_bytes()
        return made


def is_wanted(path: Path) -> bool:
    """Files without a service get an empty `_grpc`."""
    return "_pb2_grpc." not in path.name or path.name.startswith("inference_service")


def rewritten(source: str) -> str:
    """The stub under the package's own name, beside the server's `baton.v1` in one environment."""
    return _MODULE.sub("baton_client.v1", source)


def check(made: dict[Path, bytes]) -> int:
    differing = [
        path
        for path, content in made.items()
        if not (PACKAGE / path).is_file() or (PACKAGE / path).read_bytes() != content
    ]
    differing += stale(made)
    for path in differing:
        print(f"differs from protos/: {(PACKAGE / path).relative_to(ROOT)}", file=sys.stderr)
    if differing:
        print("`make client-stubs` writes them anew", file=sys.stderr)
    return 1 if differing else 0


def stale(made: dict[Path, bytes]) -> list[Path]:
    """Generated once, of messages that are gone."""
    found = [*PACKAGE.glob("v1/*.py*"), *PACKAGE.glob("*_pb2*.py*"), *PACKAGE.rglob("*.proto")]
    return [path for path in (file.relative_to(PACKAGE) for file in found) if path not in made]


def _protoc(proto_path: Path, out: Path, files: list[str], *more: str) -> None:
    options = [option if "=" in option else f"{option}={out}" for option in more]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={proto_path}"]
    command += [f"--python_out={out}", f"--pyi_out={out}", *options, *files]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)


if __name__ == "__main__":
    sys.exit(main())
