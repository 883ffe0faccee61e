"""Command-line flags that an environment variable can give as well, for containers.

`--num-blocks` is also `BATON_NUM_BLOCKS`. The command line wins over the environment; a variable
that is set to nothing counts as not set. So does, with a line that says it, what Kubernetes sets
for services that happen to be called `baton` or `baton-http`: BATON_PORT=tcp://10.96.0.12:50051.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_ADDRESS_OF_A_SERVICE = re.compile(r"(tcp|udp|sctp)://[^/\s]+:\d+", re.IGNORECASE)
_METAVARS = {"model": "DIR", "dir": "DIR", "url": "URL", "host": "HOST", "s": "S", "ms": "MS"}
"""What a flag's value is called, by the flag's last word."""
_METAVARS_BY_TYPE: dict[Any, str] = {int: "N", float: "X", str: "NAME"}
_SWITCH_VALUES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class Parser(argparse.ArgumentParser):
    """What is wrong with a command line is told in one line, and where to read on: in the help of
    the command that was meant. Flags are not to be cut short: a wrong one would mean another."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})
        for plain, convert in _NUMBERS.items():
            self.register("type", plain, convert)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Also called for each command of a parser, which would leave the error to that parser.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help says more)\n")


class _FromEnvironment(str):
    """A default that argparse converts as if it had been typed, but whose errors name `variable`.

    argparse converts defaults only when the flag is absent: a bad variable does no harm when the
    flag is given.
    """

    variable: str


def variable_name(flag: str) -> str:
    """`--num-blocks` → `BATON_NUM_BLOCKS`."""
    return "BATON_" + flag.lstrip("-").replace("-", "_").upper()


def add_flag(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    flag: str,
    *,
    type: Callable[[str], T],
    help: str,
    default: T | None = None,
    choices: Sequence[T] | None = None,
    required: bool = False,
    metavar: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> None:
    """Add `flag` to `parser`, read from its variable when the command line does not give it.

    `type` converts the text and raises ValueError or argparse.ArgumentTypeError when it cannot.
    """
    variable, given = _look_up(flag, environ)
    parser.add_argument(
        flag,
        type=_converter(type, choices, default, may_ignore=type is not str and not required),
        default=default if given is None else given,
        choices=choices,
        required=required and given is None,
        metavar=metavar or (None if choices else _metavar(flag, type)),
        help=_with_variable(help, variable, default),
    )


def add_switch(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    flag: str,
    *,
    help: str,
    environ: Mapping[str, str] | None = None,
) -> None:
    """Add a flag without value, off unless given; its variable takes 1, true, yes, 0, false, no."""
    variable, given = _look_up(flag, environ)
    parser.add_argument(
        flag,
        nargs="?",
        const=True,
        metavar="yes|no",
        type=_converter(_switch_value, None, False, may_ignore=True),
        default=False if given is None else given,
        help=_with_variable(help, variable, None),
    )


def _metavar(flag: str, type: Callable[[str], Any]) -> str:
    by_name = _METAVARS.get(flag.rpartition("-")[2])
    return by_name or _METAVARS_BY_TYPE.get(type, "N")


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


_NUMBERS: dict[Any, Callable[[str], Any]] = {int: whole_number, float: number}
"""In place of the types whose names argparse would tell, as in "invalid int value"."""


def optional_port(text: str) -> Any:
    """An int, 0 to let the system pick; None for `none`, `off` and whatever is negative."""
    # Any: with an int for default, mypy would make `int` of `int | None`.
    if text.lower() in ("none", "off"):
        return None
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, nor none") from None
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 65535")
    return None if value < 0 else value


def length_or_auto(text: str) -> Any:
    """An int of at least 2, a token of a prompt and one of an answer, or "auto"."""
    if text.lower() == "auto":
        return "auto"
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, nor auto") from None
    if not 2 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{value} is not between 2 and {2**31 - 1}")
    return value


def _look_up(flag: str, environ: Mapping[str, str] | None) -> tuple[str, _FromEnvironment | None]:
    variable = variable_name(flag)
    text = (os.environ if environ is None else environ).get(variable, "")
    if not text:
        return variable, None
    given = _FromEnvironment(text)
    given.variable = variable
    return variable, given


def _converter(
    convert: Callable[[str], T],
    choices: Sequence[T] | None,
    default: T | None,
    *,
    may_ignore: bool,
) -> Callable[[str], T | None]:
    """`may_ignore`: a variable that is a service's address leaves the flag its default. Not where
    any text may be meant."""
    of_text: Callable[[str], T] = _NUMBERS.get(convert, convert)

    def converted(text: str) -> T | None:
        if not isinstance(text, _FromEnvironment):
            return of_text(text)
        if may_ignore and _ADDRESS_OF_A_SERVICE.fullmatch(text):
            sys.stderr.write(
                f"baton: {text.variable}={text} is ignored: it is no value for that flag, but what "
                "Kubernetes sets for a service of that name\n"
            )
            return default
        try:
            value = of_text(text)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise argparse.ArgumentTypeError(f"{text.variable}={str(text)!r}: {error}") from None
        # argparse does not check defaults against `choices`.
        if choices is not None and value not in choices:
            allowed = ", ".join(str(choice) for choice in choices)
            raise argparse.ArgumentTypeError(
                f"{text.variable}={str(text)!r}: choose from {allowed}"
            )
        return value

    # argparse puts the converter's name into its message, as in "invalid int value".
    converted.__name__ = getattr(convert, "__name__", "flag")
    return converted


def _switch_value(text: str) -> bool:
    try:
        return _SWITCH_VALUES[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(_SWITCH_VALUES)}"
        ) from None


def _with_variable(help: str, variable: str, default: object) -> str:
    shown = "" if default is None else f"default: {default}; "
    return f"{help} ({shown}{variable})".replace("%", "%%")
