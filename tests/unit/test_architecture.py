"""The rules of the layout: which way imports run, what is never imported, what is never called."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What the wheel holds, as `baton.…`; each may import those before it.
PACKAGES = ("kernels", "shared", "loadtest", "services")
NOT_INSTALLED = ("benchmarks", "models", "tests", "clients", "examples", "deploy")
TREE = (*PACKAGES, *NOT_INSTALLED)

# Of the services only these import others.
SERVICES_THAT_IMPORT = {"worker": {"prefill", "decode"}}
# What starts a service as a process of its own, a worker of that role.
ENTRY_POINTS = {f"baton.services.{role}.__main__": {"worker"} for role in ("prefill", "decode")}
WITHOUT_TORCH = (
    "baton.loadtest",
    "baton.services.gateway",
    "baton.services.launcher",
    "baton.shared.directory",
    "baton.shared.kv",
    "baton.shared.rpc",
    "baton.shared.sampling",
    "baton.shared.engine.config",
    "baton.shared.engine.model_digest",
    "baton.shared.engine.models.registry",
    "baton.shared.model_files",
    "baton.shared.tokenizer",
)
WITH_TORCH = ("baton.shared.kv.digest",)
# What a model is made of is imported when one is built; whoever reads a config builds none.
LATE = "baton.shared.engine.models"
BANNED_NAMES = {"base", "common", "helpers", "utils"}
# Bytes from elsewhere must not become code.
BANNED_MODULES = {"cPickle", "cloudpickle", "dill", "marshal", "pickle", "shelve"}
BANNED_CALLS = {"eval", "exec", "os.popen", "os.system", "torch.load", "yaml.load"}


@cache
def sources(*folders: str) -> dict[str, Path]:
    """Module name → file; generated stubs left out."""
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {
        module_name(path): path for path in paths if (ROOT / "shared" / "gen") not in path.parents
    }


def module_name(path: Path) -> str:
    """As it is imported: what is installed stands under `baton`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(["baton", *parts] if parts[0] in PACKAGES else parts)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@cache
def imports(module: str, *, at_once: bool = False) -> frozenset[str]:
    """Everything that the module may import, in functions too; names, not yet resolved. `at_once`:
    what it does import when it is imported itself."""
    found: set[str] = set()
    tree = parse(sources(*TREE)[module])
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = module if is_package(module) else module.rpartition(".")[0]
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*kept, *([origin] if origin else [])])
            found.add(origin)
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return frozenset(found)


def is_package(module: str) -> bool:
    return sources(*TREE)[module].name == "__init__.py"


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def project_imports(module: str) -> Iterator[str]:
    """The project's modules that run when `module` is imported: packages on the way included."""
    known = sources(*PACKAGES)
    for name in imports(module, at_once=is_within(module, LATE)):
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            prefix = ".".join(parts[:length])
            if prefix in known:
                yield prefix


def paths_to_torch(start: str) -> list[str] | None:
    """A chain of imports from `start` to torch, if there is one."""
    came_from: dict[str, str | None] = {start: None}
    queue = [start]
    for module in queue:
        names = imports(module, at_once=is_within(module, LATE))
        if any(is_within(name, "torch") for name in names):
            chain, link = ["torch"], came_from.get(module)
            chain.append(module)
            while link is not None:
                chain.append(link)
                link = came_from[link]
            return chain[::-1]
        for imported in project_imports(module):
            if imported not in came_from:
                came_from[imported] = module
                queue.append(imported)
    return None


def test_the_walk_sees_the_code() -> None:
    modules = sources(*PACKAGES)
    assert {
        "baton.shared.rpc.errors",
        "baton.services.launcher.up",
        "baton.services.worker.process",
    } <= set(modules)
    assert "baton.shared.kv.sequence" in set(project_imports("baton.services.worker.engine_loop"))
    assert any(is_within(name, "torch") for name in imports("baton.shared.kv.digest"))
    assert paths_to_torch("baton.services.worker.process") is not None


def test_imports_run_one_way() -> None:
    wrong = [
        f"{module} imports {name}"
        for rank, package in enumerate(PACKAGES)
        for module in sources(package)
        for name in imports(module)
        if name.removeprefix("baton.").split(".")[0] in (*PACKAGES[rank + 1 :], *NOT_INSTALLED)
    ]
    assert wrong == []


def test_the_load_test_is_a_client() -> None:
    """It drives endpoints that may be anybody's: of what is here it needs the contract, how
    flags are read, and how Ctrl-C ends it."""
    wrong = [
        f"{module} imports {name}"
        for module in sources("loadtest")
        for name in imports(module)
        if name.startswith("baton.")
        and not any(
            is_within(name, allowed)
            for allowed in (
                "baton.loadtest",
                "baton.shared.interrupt",
                "baton.shared.rpc.flags",
                "baton.v1",
            )
        )
    ]
    assert wrong == []


def test_of_what_is_installed_only_the_command_imports_the_load_test() -> None:
    found = {
        module
        for module in sources("kernels", "shared", "services")
        if any(is_within(name, "baton.loadtest") for name in imports(module))
    }
    assert found == {"baton.services.launcher.commands"}


def test_tests_need_nothing_of_the_benchmarks() -> None:
    """Nor does anything but the benchmarks themselves: they may change as what is measured does."""
    wrong = [
        f"{module} imports {name}"
        for module in sources(*(folder for folder in TREE if folder != "benchmarks"))
        for name in imports(module)
        if is_within(name, "benchmarks")
    ]
    assert wrong == []


def test_of_the_services_only_the_worker_imports_others() -> None:
    wrong = []
    for module in sources("services"):
        own = ".".join(module.split(".")[2:3])
        allowed = {own} | SERVICES_THAT_IMPORT.get(own, set()) | ENTRY_POINTS.get(module, set())
        for name in imports(module):
            parts = name.split(".")
            if parts[:2] == ["baton", "services"] and len(parts) > 2 and parts[2] not in allowed:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_torch_stays_out_of_the_control_path() -> None:
    wrong = []
    for module in sources(*PACKAGES):
        if module in WITH_TORCH or not any(is_within(module, p) for p in WITHOUT_TORCH):
            continue
        chain = paths_to_torch(module)
        if chain is not None:
            wrong.append(" -> ".join(chain))
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "more"),
    [
        ("baton.services.gateway.__main__", ("process",)),
        # The launcher imports its commands when they are used.
        (
            "baton.services.launcher.__main__",
            ("commands", "generate", "health", "models", "run", "status", "up"),
        ),
        ("baton.loadtest.__main__", ()),
        ("baton.loadtest.shard", ()),
        ("baton.shared.engine.models.registry", ()),
    ],
)
def test_a_process_without_tensors_loads_no_torch(module: str, more: Sequence[str]) -> None:
    # What a third party loads counts too.
    package = module.rpartition(".")[0]
    imported = ", ".join([module, *(f"{package}.{name}" for name in more)])
    loaded = modules_after(f"import {imported}")
    assert module in loaded and "torch" not in loaded


def test_the_command_loads_only_what_it_is_asked_for() -> None:
    """`baton health` runs every few seconds in each container."""
    loaded = modules_after(
        "from baton.services.launcher.__main__ import main\n"
        "assert main(['health', '127.0.0.1:1']) == 1\n"
    )
    assert "baton.services.launcher.health" in loaded
    assert not any(is_within(name, "baton.loadtest") for name in loaded)


def modules_after(code: str) -> list[str]:
    """Names of all modules that a fresh process has loaded when it has run `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_no_module_is_named_after_nothing() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources(*TREE).values()
        if BANNED_NAMES & set(path.relative_to(ROOT).with_suffix("").parts)
    ]
    assert wrong == []


def test_nothing_is_imported_by_a_name_that_others_have() -> None:
    """Hugging Face has a package `kernels`; `shared` and `services` are anybody's."""
    wrong = [
        f"{module} imports {name}"
        for module in sources(*TREE)
        for name in imports(module)
        if name.split(".")[0] in PACKAGES
    ]
    assert wrong == []


def test_channels_are_made_where_proxies_are_switched_off() -> None:
    """`http_proxy` and the like are not meant for what our processes say to each other."""
    makers = {
        f"grpc.{aio}{kind}_channel" for aio in ("", "aio.") for kind in ("insecure", "secure")
    }
    places = {
        module
        for module, path in sources(*PACKAGES, "benchmarks").items()
        for aliases in [import_aliases(parse(path))]
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and full_name(node.func, aliases) in makers
    }
    assert places == {
        "baton.shared.rpc.serve",
        "baton.services.launcher.target",
        "baton.loadtest.target",
        "baton.loadtest.drivers",
    }


@pytest.mark.parametrize("folder", TREE)
def test_bytes_never_become_code(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for module, path in sources(folder).items()
        for line, what in dangers(parse(path))
    ]
    assert wrong == []


def dangers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    aliases = import_aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in origin or [alias.name for alias in node.names]:
                if name.split(".")[0] in BANNED_MODULES:
                    yield node.lineno, f"imports {name}"
        elif isinstance(node, ast.Call):
            called = full_name(node.func, aliases)
            if called in BANNED_CALLS:
                yield node.lineno, f"calls {called}"
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg == "shell" and not (
                    isinstance(value, ast.Constant) and value.value is False
                ):
                    yield node.lineno, "passes shell="


def import_aliases(tree: ast.Module) -> dict[str, str]:
    """Local name → what it stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def full_name(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, aliases)}.{node.attr}"
    return ""


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from marshal import loads",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "from yaml import load as read\nread('x')",
    ],
)
def test_the_danger_check_can_fail(code: str) -> None:
    assert list(dangers(ast.parse(code)))


def test_the_danger_check_leaves_others_alone() -> None:
    assert not list(dangers(ast.parse("import json\njson.load(f)\nmodel.eval()\nlibrary.load(f)")))
