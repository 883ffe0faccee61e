"""The library transformers: found or said how to get, and kept from what it must not do here.

Of a model directory it reads config.json, and those safetensors that are hashed. It takes nothing
from the network, and runs no code but its own.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from baton.shared.model_files.fields import ModelError

INSTALL = "pip install '.[transformers]'"
OLDEST = (5, 23)
"""Which is what the tests have; the masks and arguments of attention were others before."""


@functools.cache
def library() -> Any:
    """The module `transformers`.

    Raises:
        ModelError: it is not installed, too old, or cannot be imported; with the way out.
    """
    # Where the checkout's folder is on the path its `kernels` would be taken for Hugging Face's
    # package of that name; and that one loads code from the network. Neither is to be found.
    if "kernels" not in sys.modules or _is_ours(sys.modules["kernels"]):
        sys.modules["kernels"] = None  # type: ignore[assignment]
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["USE_HUB_KERNELS"] = "0"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers
    except ImportError as error:
        problem = "is not installed" if error.name == "transformers" else f"fails: {_line(error)}"
        raise ModelError(f"transformers {problem}; to install it: {INSTALL}") from None
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2] if part.isdigit())
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ModelError(
            f"transformers {transformers.__version__} is too old, {oldest} is needed: {INSTALL}"
        )
    _keep_offline()
    log: Any = transformers.utils.logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    return transformers


def _keep_offline() -> None:
    """Whatever was imported before the environment said so: it is read once."""
    from huggingface_hub import constants
    from transformers.integrations import hub_kernels

    hub: Any = constants
    kernels: Any = hub_kernels
    hub.HF_HUB_OFFLINE = True
    kernels._kernels_enabled = False


def why_not_there() -> str | None:
    """What keeps `library` from giving something."""
    try:
        library()
    except ModelError as error:
        return str(error)
    return None


def _is_ours(module: ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    own = Path(__file__).parents[3] / "kernels" / "__init__.py"
    return file is not None and own.samefile(file)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
