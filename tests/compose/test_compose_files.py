"""What the container files promise, as far as no engine is needed to see it.

`make compose-check` has docker-compose judge their form, `make compose-test` runs them.
"""

from __future__ import annotations

import importlib
import re
import socket
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from baton.services.launcher import __main__ as launcher
from baton.services.launcher.health import SERVICES
from baton.shared.rpc.flags import variable_name
from tests.device import ROOT, process_environment

WORKERS = ("prefill", "decode")
ROLES = ("gateway", *WORKERS)
PROGRAMS = {"gateway": "gateway", "prefill": "worker", "decode": "worker"}
# Those of the format that docker-compose 1.29 knows too.
TOP_LEVEL = {"services", "networks", "volumes"}
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def text(name: str) -> str:
    return (ROOT / name).read_text()


def with_defaults(document: str) -> str:
    """As compose reads it when the environment names none of its variables."""
    return VARIABLE.sub(lambda found: found[2] or "", document)


def merged(under: Any, over: Any) -> Any:
    """What a second file does to mappings and single values; lists are not in question here."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return {
        key: merged(under.get(key), over[key]) if key in over else under[key] for key in under
    } | {key: value for key, value in over.items() if key not in under}


@pytest.fixture(scope="module")
def cpu() -> Any:
    return yaml.safe_load(with_defaults(text("compose.yaml")))


@pytest.fixture(scope="module")
def gpu(cpu: Any) -> Any:
    return merged(cpu, yaml.safe_load(with_defaults(text("compose.gpu.yaml"))))


def test_both_formats_know_the_top_level(gpu: Any) -> None:
    assert {key for key in gpu if not key.startswith("x-")} == TOP_LEVEL


def test_only_the_gateway_is_published_and_only_here(cpu: Any) -> None:
    published = {name: s["ports"] for name, s in cpu["services"].items() if "ports" in s}
    assert published == {"gateway": ["127.0.0.1:50051:50051", "127.0.0.1:8000:8000"]}
    assert cpu["networks"]["internal"] == {"internal": True}
    others = {name: s["networks"] for name, s in cpu["services"].items() if name != "gateway"}
    assert set(map(tuple, others.values())) == {("internal",)}


def test_every_service_restarts_has_a_health_check_and_bounded_logs(cpu: Any) -> None:
    for service in cpu["services"].values():
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"]
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}
        # With a name of its own a service could not be scaled.
        assert "container_name" not in service


def test_each_waits_for_the_health_of_what_it_needs(cpu: Any) -> None:
    healthy = {"condition": "service_healthy"}
    needs = {name: s.get("depends_on", {}) for name, s in cpu["services"].items()}
    assert needs == {
        "redis": {},
        "prefill": {"redis": healthy},
        "decode": {"redis": healthy},
        "gateway": dict.fromkeys(("redis", *WORKERS), healthy),
    }


def test_the_directory_forgets_nothing(cpu: Any) -> None:
    command = cpu["services"]["redis"]["command"]
    settings = dict(zip(command[::2], command[1::2], strict=True))
    assert settings["--maxmemory-policy"] == "noeviction"
    assert settings["--appendonly"] == "yes"
    assert f"redis-data:{settings['--dir']}" in cpu["services"]["redis"]["volumes"]


@pytest.mark.parametrize("role", ROLES)
def test_flags_are_those_of_the_role(
    role: str, cpu: Any, gpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = importlib.import_module(f"baton.services.{PROGRAMS[role]}.process")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    known = set(re.findall(r"\bBATON_\w+", capsys.readouterr().out))
    given = {
        name
        for stack in (cpu, gpu)
        for name in stack["services"][role]["environment"]
        if name.startswith("BATON_")
    }
    flags = re.findall(r"--[\w-]+", " ".join(cpu["services"][role]["command"]))
    assert given | set(map(variable_name, flags)) <= known


@pytest.mark.parametrize("role", ROLES)
def test_the_roles_take_their_settings(
    role: str, cpu: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = importlib.import_module(f"baton.services.{PROGRAMS[role]}.process")
    for stack, device in ((cpu, "cpu"), (gpu, "cuda")):
        service = stack["services"][role]
        for name, value in service["environment"].items():
            assert isinstance(value, str | None | int)
            monkeypatch.setenv(name, "" if value is None else str(value))
        args = parser.parse_args([])
        assert (args.host, str(args.model)) == ("0.0.0.0", "/models/demo")
        assert args.drain_s < float(service["stop_grace_period"].removesuffix("s"))
        health = service["healthcheck"]["test"]
        address = f"127.0.0.1:{args.port}"
        assert health == ["CMD", "baton", "health", address, "--service", role]
        assert role in SERVICES
        if role in WORKERS:
            assert (args.role, args.device) == (role, device)
            assert f"pools:{args.shm_dir}" in service["volumes"]
        else:
            inside = [port.rpartition(":")[2] for port in service["ports"]]
            assert inside == [str(args.port), str(args.http_port)]


@pytest.mark.parametrize("role", ROLES)
def test_the_health_check_fails_where_nobody_serves(role: str, cpu: Any) -> None:
    """A check that asks nobody would pass, and everything would start at once."""
    kind, program, *arguments = cpu["services"][role]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "baton")
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    arguments[1] = nobody
    assert launcher.main(arguments) == 1


def test_pools_are_memory_that_all_workers_share(cpu: Any) -> None:
    pools = cpu["volumes"]["pools"]["driver_opts"]
    assert pools["type"] == "tmpfs" and "mode=1777" in pools["o"]


def test_the_roles_have_no_more_rights_than_they_need(cpu: Any) -> None:
    for role in ROLES:
        service = cpu["services"][role]
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "user", "ipc", "pid", "network_mode"} & set(service)


def test_gpu_workers_reserve_a_gpu_and_may_use_cuda_ipc(gpu: Any) -> None:
    chosen = []
    for role in WORKERS:
        service = gpu["services"][role]
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
        assert (service["ipc"], service["pid"]) == ("host", "host")
        assert service["ulimits"]["memlock"] == -1
        assert service["environment"]["BATON_TRANSPORT"] == "nixl"
        assert service["environment"]["BATON_ROLE"] == role
        chosen.append(service["environment"]["CUDA_VISIBLE_DEVICES"])
    assert len(set(chosen)) == len(WORKERS)
    images = {gpu["services"][role]["image"] for role in ROLES}
    builds = {gpu["services"][role]["build"]["args"]["DEVICE"] for role in ROLES}
    assert (images, builds) == ({"baton:cuda"}, {"cuda"})


def test_variables_are_explained() -> None:
    documents = [text(name) for name in ("compose.yaml", "compose.gpu.yaml")]
    used = {found[1] for document in documents for found in VARIABLE.finditer(document)}
    headers = "".join(document.partition("\nx-")[0] for document in documents)
    assert {name for name in used if not name.startswith("BATON_")} <= set(
        re.findall(r"\w+", headers)
    )


def test_without_an_engine_the_test_of_containers_says_so_in_one_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.compose.run"],
        cwd=ROOT,
        env=process_environment(DOCKER_HOST=f"unix://{tmp_path}/none.sock"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("compose-test: ") and run.stderr.count("\n") == 1


def test_the_legacy_builder_can_build_the_image() -> None:
    dockerfile = text("Dockerfile")
    assert not re.search(r"^#\s*syntax=|--mount=|<<", dockerfile, re.MULTILINE)
    last_stage = dockerfile[dockerfile.rindex("\nFROM ") :]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", last_stage, re.MULTILINE)
    assert re.search(r'^CMD \["', last_stage, re.MULTILINE)


def test_what_the_image_copies_is_there_and_let_in() -> None:
    let_in = [line[1:] for line in text(".dockerignore").splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text("Dockerfile"), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert "services" in sources
    for source in sources - {"wheelhouse/${DEVICE}*"}:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, f"{p}*") or p.startswith(f"{source}/") for p in let_in), source


def test_requirements_are_those_of_the_project() -> None:
    def printed(*extras: str) -> list[str]:
        command = [sys.executable, "deploy/requirements.py", *extras]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    names = [re.split(r"[^\w-]", line)[0] for line in printed("worker", "nixl")]
    assert {"grpcio", "torch", "nixl-cu13"} <= set(names)
    assert "torch" not in [re.split(r"[^\w-]", line)[0] for line in printed()]
