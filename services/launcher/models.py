"""`baton models`: which types are served, and whether a model directory would be. No torch."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from baton.services.launcher.output import reader_may_leave
from baton.shared.engine.host_memory import format_bytes, host_memory
from baton.shared.engine.model_facts import ModelFacts, read_model_facts
from baton.shared.engine.models import registry
from baton.shared.model_files.fields import ModelError, read_json_object
from baton.shared.model_files.info import open_config
from baton.shared.model_files.named import NAMED_MODELS, model_dir
from baton.shared.model_files.type_defaults import TEXT_TYPES
from baton.shared.tokenizer.files import load_tokenizer

_REFUSAL = "baton.shared.engine.refusal"
_REFUSED = 3
"""What it exits with."""
_BYTES = {"float32": 4, "bfloat16": 2}
"""Of a number."""


def run_models(model: str | None, *, as_json: bool) -> int:
    """Returns the exit code."""
    if model is None:
        with reader_may_leave():
            print(json.dumps(_types()) if as_json else "\n".join(_listing()))
        return 0
    try:
        told = about(model)
    except (ModelError, argparse.ArgumentTypeError) as error:
        if as_json:
            print(json.dumps({"model": model, "served": False, "reason": str(error)}))
        else:
            print(f"{model}: not served")
            print(f"baton: {error}", file=sys.stderr)
        return 1
    with reader_may_leave():
        print(json.dumps(told) if as_json else "\n".join(_lines(told)))
    return 0


def about(model: str) -> dict[str, Any]:
    """What there is to know, for JSON; `served` is None where only a start can tell.

    Raises:
        ModelError: it would not be served.
        ArgumentTypeError: it is a GGUF file that cannot be read.
    """
    directory = model_dir(model)
    name = open_config(directory).string("model_type")
    told = {"model": model, "served": True, "model_type": name, "extras": _extras(directory, name)}
    if not registry.has(name):
        _check_transformers(directory, name)
        return {**told, "served": None, "text": _text(directory)}
    facts = read_model_facts(directory)
    is_sure = find_spec("torch") is not None and _ask_worker(directory)
    return {
        **told,
        "served": True if is_sure else None,
        "is_text_part": facts.is_text_part,
        "layers": dict(facts.layer_kinds),
        "max_model_len": facts.config.max_position_embeddings,
        "text": _text(directory),
        "num_numbers": facts.weights.num_numbers,
        "stored_bytes": facts.weights.stored_bytes,
        "stored_as": list(facts.weights.forms),
        "weights_bytes": {dtype: _weights_bytes(facts, dtype) for dtype in _BYTES},
        "cache_bytes": {
            dtype: facts.cache_bytes(facts.config.max_position_embeddings, itemsize)
            for dtype, itemsize in _BYTES.items()
        },
        "ignored_fields": facts.ignored_fields,
        "flags": dict(_flags(facts)),
    }


def _lines(told: dict[str, Any]) -> Iterator[str]:
    yield from _facts(told)
    missing = ",".join(extra for extra, is_here in told["extras"].items() if not is_here)
    if missing:
        yield f"  missing  pip install '.[{missing}]'"
    yield f"  start    baton up --model {told['model']}"


def _facts(told: dict[str, Any]) -> Iterator[str]:
    yield f"{told['model']}: {'may be served' if told['served'] is None else 'served'}"
    if "layers" not in told:
        numbers = "if a start finds its numbers right"
        yield f"  type     {told['model_type']}, by transformers' code, {numbers}"
        yield f"  text     {told['text']}"
        return
    part = ", its text part" if told["is_text_part"] else ""
    shapes = ", if a start finds its tensors right" if told["served"] is None else ""
    yield f"  type     {told['model_type']}{part}, by Baton's own code{shapes}"
    layers = ", ".join(f"{count} {kind}" for kind, count in told["layers"].items())
    yield f"  layers   {layers}"
    yield f"  length   {told['max_model_len']:,} tokens"
    yield f"  text     {told['text']}"
    stored = f"{format_bytes(told['stored_bytes'])} of {', '.join(told['stored_as'])}"
    yield f"  weights  {_count(told['num_numbers'])}, {stored}"
    for dtype, expanded in told["weights_bytes"].items():
        cache = format_bytes(told["cache_bytes"][dtype])
        weights = " to ".join(format_bytes(each) for each in expanded)
        yield f"  memory   in {dtype} {weights}, and {cache} of cache for the longest sequence"
    if told["ignored_fields"]:
        yield f"  ignored  {', '.join(told['ignored_fields'])}"
    for flag, why in told["flags"].items():
        yield f"  flag     {flag}: {why}"


def _check_transformers(directory: Path, name: str) -> None:
    """Raises ModelError: it is not installed, or refuses the model before it reads weights."""
    if find_spec("transformers") is not None:
        if find_spec("torch") is not None:
            _ask_worker(directory)
        return
    known = ", ".join(each.name for each in registry.model_types())
    raise ModelError(
        f"{directory / 'config.json'}: model_type: {json.dumps(name)} is not supported; supported "
        f"are {known}; others may run through transformers: "
        "pip install '.[worker,transformers]'"
    )


def _ask_worker(directory: Path) -> bool:
    """Whether one would go on to read weights, in a process of its own, for here there is no torch.
    Raises ModelError: it refuses."""
    command = [sys.executable, "-m", _REFUSAL, str(directory)]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode == _REFUSED:
        raise ModelError(asked.stdout.strip())
    return asked.returncode == 0


def _extras(directory: Path, name: str) -> dict[str, bool]:
    """Parts of `pip install '.[...]'` that a worker of this model takes, and whether they are
    here."""
    wanted = {"worker": "torch"}
    if not registry.has(name):
        wanted["transformers"] = "transformers"
    if not (directory / "tokenizer.json").exists() and any(directory.glob("*.model")):
        wanted["sentencepiece"] = "sentencepiece"
    return {extra: find_spec(package) is not None for extra, package in wanted.items()}


def _text(directory: Path) -> str:
    if load_tokenizer(directory) is None:
        return "token ids only: there is no tokenizer that can be read"
    config = directory / "tokenizer_config.json"
    in_config = config.exists() and read_json_object(config).get("chat_template")
    if in_config or (directory / "chat_template.jinja").exists():
        return "prompts and chats"
    return "prompts; chats are refused, for there is no chat template"


def _weights_bytes(facts: ModelFacts, dtype: str) -> list[int]:
    """What they take once loaded; of two figures the first where no layer has to be expanded."""
    expanded = facts.weights.num_numbers * _BYTES[dtype]
    if facts.is_quantised and dtype != "float32" and facts.weights.stored_bytes < expanded:
        return [facts.weights.stored_bytes, expanded]
    return [expanded]


def _flags(facts: ModelFacts) -> Iterator[tuple[str, str]]:
    """Those that this model is better served with on this machine's CPU, and why."""
    free = host_memory().free_bytes
    [weights] = _weights_bytes(facts, "float32")
    cache = facts.cache_bytes(facts.config.max_position_embeddings, _BYTES["float32"])
    if weights + cache > free:
        yield "--max-model-len auto", f"more than the {format_bytes(free)} that are free here"
    if weights > free or facts.is_quantised:
        yield "--dtype bfloat16", "smaller on a CPU, and not bit for bit reproducible"


def _count(number: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.3g} {name} numbers"
    return f"{number:,} numbers"


def _types() -> dict[str, Any]:
    return {
        "types": [each.name for each in registry.model_types()],
        "text_parts": sorted(TEXT_TYPES),
        "fetched_by_name": sorted(NAMED_MODELS),
    }


def _listing() -> Iterator[str]:
    yield "Served by Baton's own code, by `model_type` of config.json:"
    names = [each.name for each in registry.model_types()]
    width = max(map(len, names)) + 2
    for start in range(0, len(names), 4):
        yield "  " + "".join(f"{name:<{width}}" for name in names[start : start + 4]).rstrip()
    parts = [name for name in names if name in TEXT_TYPES]
    yield f"Of {', '.join(parts)} the text part is served."
    if find_spec("transformers") is None:
        yield "Others may run through transformers' code, slower: pip install '.[transformers]'."
    else:
        yield "Others may run through transformers' code, slower: `baton models DIR` tells."
    yield f"To be fetched by name (baton fetch NAME): {', '.join(NAMED_MODELS)}."
