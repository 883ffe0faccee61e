"""What `--speculate` says: who guesses the next tokens, and how many of them a step checks."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NGRAM, DRAFT_MODEL, EAGLE3, MTP = KINDS = ("ngram", "draft-model", "eagle3", "mtp")
WITH_MODEL = (DRAFT_MODEL, EAGLE3)
"""Kinds for which a directory is given."""
MAX_DRAFTS = 15
"""Of a sequence in a step: with the token before them, the rows that small products are padded to
on a CPU anyway."""
DEFAULT_DRAFTS = 7
METAVAR = f"{'|'.join(KINDS)}[:K]"
HELP = (
    f"decode guesses tokens and verifies several in a step, K at most (1 to {MAX_DRAFTS}, default "
    f"{DEFAULT_DRAFTS}), fewer where fewer pay; answers stay the same. {NGRAM}: as prompt and "
    f"answer went on before; {DRAFT_MODEL}: as the smaller model of --draft-model does; "
    f"{EAGLE3}: as the EAGLE-3 head of --draft-model does by the model's hidden states; {MTP}: as "
    "a layer does by them that the model's own checkpoint ships; default: none"
)
DRAFT_MODEL_HELP = (
    f"of --speculate {' or '.join(WITH_MODEL)}: directory, or name, of the model, or head, that "
    "guesses; its vocabulary is the model's"
)


@dataclass(frozen=True, slots=True)
class Speculation:
    """`kind`: one of KINDS. `num_drafts`: the most guesses that a step checks for a sequence."""

    kind: str
    num_drafts: int = DEFAULT_DRAFTS

    def __str__(self) -> str:
        return f"{self.kind}:{self.num_drafts}"


def speculation(text: str) -> Any:
    """`ngram` or `ngram:4` → Speculation; None for `none`.

    Raises argparse.ArgumentTypeError, which names what would do.
    """
    # Any: with a Speculation for default, mypy would make one of `Speculation | None`.
    if text.lower() == "none":
        return None
    kind, colon, number = text.partition(":")
    if kind not in KINDS:
        known = ", ".join((*KINDS, "none"))
        raise argparse.ArgumentTypeError(f"{kind!r} is no kind of drafts; choose from {known}")
    if not colon:
        return Speculation(kind)
    if not (number.isascii() and number.isdigit()) or not 1 <= int(number[:9]) <= MAX_DRAFTS:
        raise argparse.ArgumentTypeError(
            f"{number!r} drafts: must be a number from 1 to {MAX_DRAFTS}"
        )
    return Speculation(kind, int(number))


def why_not_together(speculate: Speculation | None, draft_model: Path | None) -> str | None:
    """One line for two flags that want each other."""
    wants_model = speculate is not None and speculate.kind in WITH_MODEL
    if wants_model and draft_model is None:
        return f"--speculate {speculate} needs --draft-model, the model, or head, that guesses"
    if draft_model is not None and not wants_model:
        said = "none" if speculate is None else str(speculate)
        return f"--draft-model is for --speculate {' or '.join(WITH_MODEL)}, not for {said}"
    return None
