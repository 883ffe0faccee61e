"""Stubs of Baton's public contract for other languages (`make stubs LANG=go OUT=dir`).

Runs the language's own generators where they are or can be installed here; otherwise prints what to
install and the exact command, and exits with 3.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTRACT = tuple(
    f"baton/v1/{name}.proto" for name in ("types", "error_details", "inference_service")
)
"""What the gateway shows to clients."""
EXIT_FAILED, EXIT_USAGE, EXIT_CANNOT_HERE = 1, 2, 3

TS_PROTO = "ts-proto@2.18.0"
BUILT_IN_PYTHON = "python -m grpc_tools.protoc"
_DEBIAN_PROTOC = "protobuf-compiler libprotobuf-dev"


@dataclass(frozen=True)
class Language:
    """How stubs of one language are made. `{out}` and `{package}` stand for what the caller says;
    a plugin's first name that is found on the PATH is taken."""

    flags: tuple[str, ...]
    plugins: tuple[tuple[str, ...], ...]
    install: tuple[str, ...]
    """Commands, one of which brings what is missing."""
    to_use: str
    """What the stubs need where they are compiled."""
    protoc: str = BUILT_IN_PYTHON
    named: str = ""
    """Shell text for a plugin that has another name in Debian."""
    attempt: tuple[str, ...] = ()
    """Installs the plugins into `{tools}`, and nothing elsewhere."""


def _go_options() -> str:
    return ",".join(["module={package}", *(f"M{name}={{package}}" for name in CONTRACT)])


LANGUAGES = {
    "go": Language(
        flags=(
            "--go_out={out}",
            f"--go_opt={_go_options()}",
            "--go-grpc_out={out}",
            f"--go-grpc_opt={_go_options()}",
        ),
        plugins=(("protoc-gen-go",), ("protoc-gen-go-grpc",)),
        attempt=(
            "go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.6",
            "go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.5.1",
        ),
        install=(f"apt-get install {_DEBIAN_PROTOC} protoc-gen-go protoc-gen-go-grpc",),
        to_use="google.golang.org/grpc, google.golang.org/protobuf",
    ),
    "java": Language(
        flags=("--java_out={out}", "--grpc-java_out={out}"),
        plugins=(("protoc-gen-grpc-java", "grpc_java_plugin"),),
        # The protoc of grpcio-tools cannot write Java.
        protoc="protoc",
        named="--plugin=protoc-gen-grpc-java=$(command -v grpc_java_plugin)",
        install=(f"apt-get install {_DEBIAN_PROTOC} protobuf-compiler-grpc-java-plugin",),
        to_use="io.grpc:grpc-stub, io.grpc:grpc-protobuf, io.grpc:grpc-netty, and "
        "com.google.protobuf:protobuf-java no older than protoc",
    ),
    "python": Language(
        flags=(
            "--python_out={out}",
            "--pyi_out={out}",
            "--grpc_python_out={out}",
            "--mypy_grpc_out={out}",
        ),
        plugins=(("protoc-gen-mypy_grpc",),),
        install=("pip install grpcio-tools mypy-protobuf",),
        to_use="grpcio and protobuf no older than those here; clients/python has a client",
    ),
    "ts": Language(
        flags=(
            "--ts_proto_out={out}",
            "--ts_proto_opt=outputServices=grpc-js,esModuleInterop=true,forceLong=bigint",
        ),
        plugins=(("protoc-gen-ts_proto",),),
        attempt=(f"npm install --no-audit --no-fund --prefix {{tools}} {TS_PROTO}",),
        install=(f"npm install {TS_PROTO}",),
        to_use="npm: @grpc/grpc-js, @bufbuild/protobuf",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lang", required=True, choices=sorted(LANGUAGES))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if missing")
    parser.add_argument(
        "--go-package",
        default="baton/v1",
        metavar="PATH",
        help="Go's import path of the stubs, such as example.com/team/baton (default baton/v1)",
    )
    parser.add_argument(
        "--tools",
        type=Path,
        default=ROOT / ".venv" / "stubs",
        metavar="DIR",
        help="where generators are looked for before the PATH, and installed",
    )
    arguments = parser.parse_args()
    language: Language = LANGUAGES[arguments.lang]
    tools: Path = arguments.tools.resolve() / arguments.lang
    found = find_plugins(language, tools)
    if found is None and language.attempt:
        attempt(language, tools)
        found = find_plugins(language, tools)
    protoc = find_protoc(language)
    if found is None or protoc is None:
        print_elsewhere(arguments.lang, language, arguments.out, arguments.go_package)
        return EXIT_CANNOT_HERE
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"stubs: {arguments.out}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    out: Path = arguments.out.resolve()
    command = [*protoc, *protoc_arguments(language, str(out), arguments.go_package, found)]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        return EXIT_FAILED
    print(f"{arguments.lang} stubs are in {out}; they need {language.to_use}")
    return 0


def find_plugins(language: Language, tools: Path) -> dict[str, str] | None:
    """Plugin's name → its path; None when one is missing."""
    places = [tools / "bin", tools / "node_modules" / ".bin", Path(sys.executable).parent]
    path = os.pathsep.join([*map(str, places), os.environ.get("PATH", "")])
    found: dict[str, str] = {}
    for names in language.plugins:
        paths = [which for name in names if (which := shutil.which(name, path=path))]
        if not paths:
            return None
        found[names[0]] = paths[0]
    return found


def find_protoc(language: Language) -> list[str] | None:
    """The command of a protoc that finds the well-known types; None when it is not there."""
    if language.protoc == BUILT_IN_PYTHON:
        return [sys.executable, "-m", "grpc_tools.protoc"]
    path = shutil.which(language.protoc)
    return [path, f"--proto_path={well_known_types()}"] if path else None


def well_known_types() -> Path:
    """google/protobuf/*.proto: Debian's protoc leaves them to another package."""
    return Path(str(resources.files("grpc_tools"))) / "_proto"


def attempt(language: Language, tools: Path) -> None:
    """Installs the generators under `tools`, where that can be done."""
    environment = {**os.environ, "GOBIN": str(tools / "bin")}
    for line in language.attempt:
        command = shlex.split(line.format(tools=shlex.quote(str(tools))))
        if shutil.which(command[0]) is None:
            return
        tools.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"stubs: {shlex.join(command)}: {last}", file=sys.stderr)
            return


def protoc_arguments(
    language: Language, out: str, package: str, plugins: dict[str, str]
) -> Sequence[str]:
    named = [f"--plugin={name}={path}" for name, path in plugins.items()]
    flags = [flag.format(out=out, package=package) for flag in language.flags]
    return [f"--proto_path={ROOT / 'protos'}", *named, *flags, *CONTRACT]


def print_elsewhere(name: str, language: Language, out: Path, package: str) -> None:
    """The command for a machine that has the generators, or can install them."""
    flags = [flag.format(out=out, package=package) for flag in language.flags]
    # Python's generator brings a protoc of its own.
    tool = BUILT_IN_PYTHON.split() if name == "python" else ["protoc"]
    generate = shlex.join([*tool, "--proto_path=protos", *flags, *CONTRACT])
    if language.named:
        generate = f"{generate} {language.named}"
    installs = [*language.install]
    if language.attempt:
        installs = [" && ".join(language.attempt).format(tools="."), *installs]
    print(f"The generators for {name} are not here. Install them by one of", file=sys.stderr)
    for line in installs:
        print(f"    {line}", file=sys.stderr)
    print("and run, in this repository,", file=sys.stderr)
    print(f"    mkdir -p {shlex.quote(str(out))}", file=sys.stderr)
    print(f"    {generate}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
