"""What the values of flags may be: text in, a value or a message for the user out."""

from __future__ import annotations

import argparse
import math
import re

from baton.shared.rpc.flags import number, whole_number

_MAX_SECONDS = 1e9
"""Some thirty years; deadlines in a far more distant future overflow within gRPC."""


def count(text: str) -> int:
    return _integer(text, 0, 1024)


def positive(text: str) -> int:
    return _integer(text, 1, 2**31 - 1)


def port(text: str) -> int:
    return _integer(text, 0, 65535)


def uint32(text: str) -> int:
    return _integer(text, 0, 2**32 - 1)


def uint64(text: str) -> int:
    return _integer(text, 0, 2**64 - 1)


def seconds(text: str) -> float:
    value = number(text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time in seconds")
    if value > _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_MAX_SECONDS:.0f} seconds")
    return value


def token_ids(text: str) -> list[int]:
    try:
        return [uint32(part) for part in text.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no comma-separated list of token ids, such as 1,2,3"
        ) from None


def biases(text: str) -> dict[int, float]:
    """Numbers by token id."""
    numbers: dict[int, float] = {}
    for part in text.split(","):
        try:
            token_id, bias = part.split(":")
            numbers[uint32(token_id)] = float(bias)
        except (ValueError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(
                f"{part!r} is no token id with a number, as in 1:-100,2:5.5"
            ) from None
    return numbers


def address(text: str) -> str:
    """HOST:PORT of a gRPC server, also as `grpc://HOST:PORT`."""
    if text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(
            f"{text!r} speaks HTTP; HOST:PORT of gRPC is meant, such as 127.0.0.1:50051"
        )
    text = text.removeprefix("grpc://")
    if not re.fullmatch(r"(unix:.+|([^:/]+|\[[^]]+\]):[0-9]{1,5})", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT, such as 127.0.0.1:50051")
    return text


def utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("not valid UTF-8") from None
    return text


def _integer(text: str, low: int, high: int) -> int:
    value = whole_number(text)
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
    return value
