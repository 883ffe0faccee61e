"""How many tokens a prompt or an answer has: a number, or a distribution as text. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from baton.loadtest.spec import LoadError

FORMS = "N, uniform:LOW:HIGH, normal:MEAN:SD or lognormal:MEDIAN:SIGMA"
Draw = Callable[[random.Random], int]


def lengths(text: str, flag: str) -> Draw:
    """Draws of at least 1 token. `lognormal:512:0.5` has the median 512, and 68 % lie within a
    factor of e^0.5 of it. Raises LoadError."""
    kind, _, rest = text.rpartition(":") if ":" not in text else text.partition(":")
    try:
        numbers = [float(number) for number in rest.split(":")]
        draw = _draw(kind or "fixed", *numbers)
        first = draw(random.Random(0))
    except (TypeError, ValueError, OverflowError):
        raise LoadError(f"{flag} {text}: must be {FORMS}, in tokens") from None
    del first
    return draw


def _draw(kind: str, *numbers: float) -> Draw:
    """Raises TypeError, ValueError for what is no distribution of lengths."""
    if not all(map(math.isfinite, numbers)) or min(numbers) < 0:
        raise ValueError(kind)
    match kind, numbers:
        case "fixed", (tokens,) if tokens >= 1 and tokens.is_integer():
            return lambda draw: int(tokens)
        case "uniform", (low, high) if 1 <= low <= high:
            return lambda draw: draw.randint(round(low), round(high))
        case "normal", (mean, deviation) if mean >= 1:
            return lambda draw: max(1, round(draw.gauss(mean, deviation)))
        case "lognormal", (median, sigma) if median >= 1:
            return lambda draw: max(1, round(median * math.exp(draw.gauss(0.0, sigma))))
    raise ValueError(kind)
