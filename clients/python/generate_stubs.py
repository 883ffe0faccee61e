"""Writes what of `baton_client` is generated: stubs, sampling arguments, the contract as data.

    python generate_stubs.py            write into src/baton_client
    python generate_stubs.py --check    write nothing; exit 1 and name what differs

Runs in an environment with requirements-stubs.txt alone (`make client-stubs`, `make client-check`):
stubs need the grpcio and protobuf of their generator or newer ones, so the generator's age decides
which versions the package works with.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

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
        described = out / "types.binpb"
        _protoc(ROOT / "protos", out, contract[:1], "--include_source_info",
                f"--descriptor_set_out={described}")  # fmt: skip
        [types] = FileDescriptorSet.FromString(described.read_bytes()).file
        made[Path("sampling.py")] = sampling_source(types).encode()
        return made


def sampling_source(types: FileDescriptorProto) -> str:
    """The fields of SamplingParams as typed arguments, with their comments in the contract."""
    comments = {tuple(at.path): at.leading_comments for at in types.source_code_info.location}
    index = [message.name for message in types.message_type].index("SamplingParams")
    source = [_SAMPLING_HEAD]
    entries = {each.name: each.field for each in types.message_type[index].nested_type}
    for number, field in enumerate(types.message_type[index].field):
        if field.type == FieldDescriptorProto.TYPE_MESSAGE:
            key, value = (
                _PYTHON_TYPES[each.type] for each in entries[field.type_name.rsplit(".", 1)[1]]
            )
            kind = f"Mapping[{key}, {value}]"
        elif field.label == FieldDescriptorProto.LABEL_REPEATED:
            kind = f"Sequence[{_PYTHON_TYPES[field.type]}]"
        else:
            kind = f"{_PYTHON_TYPES[field.type]} | None"
        source.append(f"    {field.name}: {kind}")
        # 4: the file's messages, 2: a message's fields.
        text = " ".join(comments[4, index, 2, number].split())
        lines = textwrap.wrap(f'"""{text}"""', width=96)
        source += [f"    {line}" for line in lines]
    return "\n".join(source) + "\n"


_SAMPLING_HEAD = '''\
"""Generated from protos/baton/v1/types.proto by `make client-stubs`: how tokens are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict


class Sampling(TypedDict, total=False):
    """What is left out, or None, takes the server's default."""
'''
_PYTHON_TYPES = {
    FieldDescriptorProto.TYPE_FLOAT: "float",
    FieldDescriptorProto.TYPE_UINT32: "int",
    FieldDescriptorProto.TYPE_UINT64: "int",
    FieldDescriptorProto.TYPE_BOOL: "bool",
    FieldDescriptorProto.TYPE_STRING: "str",
}


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
    """Files that were generated once, from messages that are gone."""
    found = [*PACKAGE.glob("v1/*.py*"), *PACKAGE.glob("*_pb2*.py*"), *PACKAGE.rglob("*.proto")]
    return [path for path in (file.relative_to(PACKAGE) for file in found) if path not in made]


def _protoc(proto_path: Path, out: Path, files: list[str], *more: str) -> None:
    options = [f"{option}={out}" if option.endswith("_out") else option for option in more]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={proto_path}"]
    command += [f"--python_out={out}", f"--pyi_out={out}", *options, *files]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)


if __name__ == "__main__":
    sys.exit(main())
