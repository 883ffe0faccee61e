"""Which device a worker computes on, and which transport moves its blocks: one decision.

`shm` moves blocks between CPU pools only. A worker that hands over must not compute where no
transport reaches; one of role `both` may, and then serves by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


class TransportUnavailable(Exception):
    """What was asked for by name cannot be had. One line, that begins with the flags."""


@dataclass(frozen=True, slots=True)
class Choice:
    device: str
    """cpu or cuda."""
    transport: str
    """shm or nixl. With `shm` on a GPU nothing can be read here, and nothing handed over."""
    warning: str | None = None
    """To be logged."""


def choose_transport(
    *,
    role: str,
    device: str,
    transport: str,
    has_cuda: bool,
    why_no_nixl: Callable[[str], str | None],
) -> Choice:
    """`role`: prefill, decode or both; `device`: auto, cpu or cuda; `transport`: auto, shm or nixl.

    `why_no_nixl`: device → what keeps NIXL from it, or None; asked when it matters only, since
    asking costs half a second. Raises TransportUnavailable.
    """
    if device == "cuda" and not has_cuda and transport != "nixl":
        # The engine says so; which transport does not matter any more.
        return Choice("cuda", "shm")
    best = "cpu" if device == "cpu" or not (has_cuda or device == "cuda") else "cuda"
    if transport == "nixl":
        problem = why_no_nixl(best)
        if problem is not None:
            raise TransportUnavailable(f"--transport nixl: {problem}")
        return Choice(best, "nixl")
    if best == "cpu":
        return Choice("cpu", "shm")
    problem = "shm moves CPU pools only" if transport == "shm" else why_no_nixl("cuda")
    if problem is None:
        return Choice("cuda", "nixl")
    if role == "both":
        return Choice("cuda", "shm", f"no transport for this GPU's pool, no hand-off: {problem}")
    if device == "auto":
        return Choice(
            "cpu",
            "shm",
            f"role {role} computes on the CPU, no transport for a GPU's pool: {problem}",
        )
    flags = "--device cuda" + (" --transport shm" if transport == "shm" else "")
    raise TransportUnavailable(
        f"{flags}, --role {role}: no transport for a GPU's pool ({problem}); take --role both, or "
        "--device cpu"
    )
