"""Matchers for constrained sequences, compiled beside the engine's thread and the streams'."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from baton.shared.constraints.compiler import CompiledConstraint, Compiler
from baton.shared.constraints.matcher import AnswerMatcher, TokenNotAllowed
from baton.shared.constraints.tokens import TokenTable
from baton.shared.kv.sequence import Sequence
from baton.shared.model_files.fields import ModelError
from baton.shared.rpc.errors import Cancelled, InvalidField, NoTokenizer
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

_TOKENS_A_MASK = 8
_MAX_REPLAY_S = 5.0
"""Of CPU time. An ordinary grammar takes some 20,000 tokens a second."""


class Grammars:
    def __init__(self, tokens: TokenTable | str) -> None:
        """`tokens`: the model's, or, in words, why no constraint can be compiled."""
        self._compiler = tokens if isinstance(tokens, str) else Compiler(tokens)
        self._thread = ThreadPoolExecutor(1, "grammars")

    @classmethod
    def load(cls, model_dir: Path, vocab_size: int) -> Grammars:
        """Before there are streams: with a large vocabulary no other thread runs for seconds."""
        try:
            tokens = TokenTable.load(model_dir, vocab_size)
        except ModelError as error:
            return cls(f"the worker's tokenizer cannot be used: {error}")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of llguidance; the worker serves all others
            log_event(logger, logging.ERROR, "no constraint can be compiled", exc_info=True)
            return cls("the worker's tokenizer cannot be used for constraints")
        return cls(tokens or "a constraint needs a tokenizer, and the worker has none")

    async def matcher_for(self, sequence: Sequence) -> AnswerMatcher:
        """It knows what was emitted. When nobody waits for it any more it is not made.

        Raises InvalidField for a constraint that cannot be compiled, or followed so far;
        NoTokenizer.
        """
        given_up = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._make, sequence, given_up.is_set)
        finally:
            given_up.set()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, sequence: Sequence, is_given_up: Callable[[], bool]) -> AnswerMatcher:
        if isinstance(self._compiler, str):
            raise NoTokenizer(self._compiler)
        if is_given_up():
            raise Cancelled("nobody waits for it")
        compiled = self._compiler.compile(sequence.constraint)
        return _replayed(compiled, sequence, is_given_up)


def _replayed(
    compiled: CompiledConstraint, sequence: Sequence, is_given_up: Callable[[], bool]
) -> AnswerMatcher:
    """Here, since the engine's thread must not wait: what a grammar makes of a long answer may take
    minutes. It is the masks whose work is bounded, so there is one every few tokens."""
    matcher = AnswerMatcher(compiled, ignore_eos=sequence.params.ignore_eos)
    emitted, started_s = sequence.emitted_token_ids, time.thread_time()
    for start in range(0, len(emitted), _TOKENS_A_MASK):
        if is_given_up():
            raise Cancelled("nobody waits for it")
        try:
            matcher.take(emitted[start : start + _TOKENS_A_MASK])
        except TokenNotAllowed as error:
            # Earlier attempts drew under masks: it is what the client brought.
            limit = "the beginning of an answer"
            raise InvalidField("received_token_ids", str(error), limit=limit) from None
        matcher.masks()
        if time.thread_time() - started_s > _MAX_REPLAY_S:
            raise InvalidField(
                "constraint",
                f"takes over {_MAX_REPLAY_S:g} s to be followed along {len(emitted)} tokens",
                limit="a simpler one, or a shorter answer",
            )
    return matcher
