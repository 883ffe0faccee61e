"""Compiles constraints in a process of its own, which a hostile one may exhaust.

    gateway ── Constraint ──► compile, first mask ── Failure, empty when there is none ──► gateway

Messages are serialised, with their length before them. What takes too much time or memory ends the
process; the gateway sees how, and starts another one.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO

from baton.services.gateway.compiler_process import CPU_S, LENGTH, MEMORY_BYTES
from baton.shared.constraints.compiler import compile_constraint
from baton.shared.constraints.matcher import AnswerMatcher
from baton.shared.constraints.tokens import TokenTable
from baton.shared.model_files.fields import ModelError
from baton.shared.rpc.errors import BatonError, NoTokenizer, to_failure
from baton.v1 import types_pb2

_NICE = 10
"""Streams go before."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m baton.services.gateway.constraint_check")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    args = parser.parse_args()
    # Its end is that of its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICE)
    replies, requests = sys.stdout.buffer, sys.stdin.buffer
    try:
        tokens = TokenTable.load(args.model, args.vocab_size)
    except ModelError as error:
        _reply(replies, NoTokenizer(str(error)))
        return
    if tokens is None:
        _reply(replies, NoTokenizer("the model has no tokenizer"))
        return
    _limit_memory()
    _reply(replies, None)
    while (request := _read(requests)) is not None:
        _limit_time()
        try:
            compiled = compile_constraint(types_pb2.Constraint.FromString(request), tokens)
            AnswerMatcher(compiled).masks()
        except BatonError as error:
            _reply(replies, error)
        else:
            _reply(replies, None)


def _limit_memory() -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        # Not on Linux: what a process has is not known, and its time alone is bounded.
        return
    pages = int(statm.read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime) + 1 + CPU_S
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    return stream.read(length)


def _reply(stream: BinaryIO, error: BatonError | None) -> None:
    message = b"" if error is None else to_failure(error).SerializeToString()
    stream.write(LENGTH.pack(len(message)) + message)
    stream.flush()


if __name__ == "__main__":
    main()
